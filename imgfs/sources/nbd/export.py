"""Images given to one program, over NBD: so that it opens no file itself.

The socket has no name: the program inherits a descriptor of it, and connects to
`/proc/self/fd/N`.  What is spoken is the newstyle of the NBD protocol (doc/proto.md) with its fixed
negotiation, NBD_OPT_GO, simple replies, and reading only: what qemu cannot do without.  Each image
is an export, named by its number.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
from collections.abc import Sequence

import trio

from imgfs.errors import ImgfsError
from imgfs.image import Buffer, Image
from imgfs.sources.nbd.command import listen

log = logging.getLogger(__name__)

OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_ABORT, OPT_GO = 1, 2, 7
REP_ACK, REP_INFO = 1, 3
REP_ERR_UNSUP, REP_ERR_UNKNOWN = 0x80000001, 0x80000006
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN = 1, 2, 1 << 8
CMD_READ, CMD_DISC = 0, 2
EIO, EINVAL = 5, 22

REQUEST = struct.Struct(">IHH8sQI")
REPLY = struct.Struct(">II8s")
MOST_OPTION = 8192  # bytes of an option
MOST_READ = 32 << 20
SECTOR = 512
AT_ONCE = 16  # reads of one connection
_FIRST_FD = 10  # a program's own numbers are lower


class Exports:
    """Serves `images`, which it does not own, until it is closed; `fd` is for a program to inherit.

    `serve` is a task of its own.
    """

    def __init__(self, images: Sequence[Image]) -> None:
        """[blocks]  Raises OSError."""
        self._images = images
        self._listener, inode = listen()
        try:
            self.fd = fcntl.fcntl(inode, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
        except BaseException:
            self._listener.close()
            raise
        finally:
            os.close(inode)
        self._scope = trio.CancelScope()

    @property
    def path(self) -> str:
        """Of the socket, in a program that has `fd`."""
        return f"/proc/self/fd/{self.fd}"

    async def serve(self) -> None:
        with self._listener, self._scope:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
            await trio.serve_listeners(self._connection, [listener])

    def close(self) -> None:
        """Serve nobody any more."""
        self._scope.cancel()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                peer = _Peer(stream)
                image = await self._negotiate(peer)
                if image is not None:
                    await peer.transmit(image)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError) as exc:
            log.debug("a reader of exports has gone: %s", exc)

    async def _negotiate(self, peer: _Peer) -> Image | None:
        """The image that is wanted; None when the client has had enough."""
        await peer.send(b"NBDMAGIC" + OPTION_MAGIC + struct.pack(">H", FIXED_NEWSTYLE | NO_ZEROES))
        await peer.receive(4)  # its flags: nothing here depends on them
        while True:
            magic, option, length = struct.unpack(">8sII", await peer.receive(16))
            if magic != OPTION_MAGIC or length > MOST_OPTION:
                raise EOFError("it does not speak NBD")
            data = await peer.receive(length)
            if option == OPT_ABORT:
                await peer.answer(option, REP_ACK)
                return None
            if option == OPT_EXPORT_NAME:
                raise EOFError("it does not know NBD_OPT_GO")
            if option != OPT_GO:
                await peer.answer(option, REP_ERR_UNSUP)
                continue
            image = self._named(data[4 : 4 + int.from_bytes(data[:4], "big")])
            if image is None:
                await peer.answer(option, REP_ERR_UNKNOWN)
                continue
            await peer.answer(option, REP_INFO, struct.pack(">H", INFO_EXPORT) + _described(image))
            sizes = struct.pack(">HIII", INFO_BLOCK_SIZE, 1, 65536, MOST_READ)
            await peer.answer(option, REP_INFO, sizes)
            await peer.answer(option, REP_ACK)
            return image

    def _named(self, name: bytes) -> Image | None:
        numbers = {b"%d" % number: image for number, image in enumerate(self._images)}
        return numbers.get(name)


async def _read(image: Image, offset: int, length: int) -> Buffer:
    inside = min(length, max(0, image.size - offset))
    data = await image.read(min(offset, image.size), inside)
    return data if inside == length else bytes(data).ljust(length, b"\0")


def _described(image: Image) -> bytes:
    # qemu has whole sectors, and of the simple reply to its last read it expects a whole one too.
    size = -(-image.size // SECTOR) * SECTOR
    return struct.pack(">QH", size, HAS_FLAGS | READ_ONLY | CAN_MULTI_CONN)


class _Peer:
    """The other end.  Raises EOFError when it goes away, or says what cannot be meant."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._sending = trio.Lock()

    async def receive(self, length: int) -> bytes:
        while len(self._buffer) < length:
            data = await self._stream.receive_some(65536)
            if not data:
                raise EOFError("it closed the connection")
            self._buffer += data
        found = bytes(self._buffer[:length])
        del self._buffer[:length]
        return found

    async def send(self, head: bytes, data: Buffer = b"") -> None:
        async with self._sending:
            await self._stream.send_all(head)
            await self._stream.send_all(data)

    async def answer(self, option: int, kind: int, data: bytes = b"") -> None:
        """To an option."""
        head = struct.pack(">QIII", OPTION_REPLY_MAGIC, option, kind, len(data))
        await self.send(head + data)

    async def transmit(self, image: Image) -> None:
        """Serve reads until the client has had enough."""
        limit = trio.Semaphore(AT_ONCE)
        async with trio.open_nursery() as nursery:
            while (request := await self._request()) is not None:
                await limit.acquire()
                nursery.start_soon(self._reply, image, *request, limit)
            nursery.cancel_scope.cancel()

    async def _request(self) -> tuple[bytes, int, int] | None:
        """(cookie, offset, length) of the next read; None when no other will come."""
        try:
            request = REQUEST.unpack(await self.receive(REQUEST.size))
        except (EOFError, trio.BrokenResourceError):
            return None
        magic, _, kind, cookie, offset, length = request
        if magic != REQUEST_MAGIC or kind != CMD_READ:
            if kind != CMD_DISC:
                log.warning("a reader of exports sent the command %d, which nobody offered", kind)
            return None
        return cookie, offset, length

    async def _reply(
        self, image: Image, cookie: bytes, offset: int, length: int, limit: trio.Semaphore
    ) -> None:
        data: Buffer = b""
        error = 0 if 0 < length <= MOST_READ else EINVAL
        try:
            if not error:
                data = await _read(image, offset, length)
        except ImgfsError as exc:
            log.info("%s", exc)
            error = EIO
        except Exception:
            log.exception("%s: read of %d bytes at %d", image.name, length, offset)
            error = EIO
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.send(REPLY.pack(REPLY_MAGIC, error, cookie), data)
        limit.release()
