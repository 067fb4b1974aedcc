"""One connection to an NBD server: a libnbd handle, driven by trio.

libnbd is a state machine over a non-blocking socket.  It says which way the socket is to become
ready (`aio_get_direction`) and is told when it is (`aio_notify_read`, `aio_notify_write`); a
command's callbacks run inside of those calls, on the loop's thread.  One task a connection does
that, `drive`.  It waits on an epoll set with the socket in it, so that whoever issues a command
while it waits can change what it waits for.

    connecting ----> in use ----> lost (`lost` says why; every request has its answer by then)

What libnbd does synchronously: parsing the URI, looking the host's name up and starting the first
connect, all inside of `aio_connect_uri`, which therefore runs in a worker thread; reading the
files for TLS (on the loop's thread: they are local, and small).

Invariants.  A request is answered exactly once (`Request.end`), also when the connection is
lost and libnbd does not know it.  Its buffer lives until then: libnbd's binding holds a view of
it, and a reader that goes away just forgets it.  The handle is closed in `end`, after which libnbd
writes to no buffer, but for one with which a thread still dials: that closes it then.

The watchdog.  While requests are out and none of them is answered for `timeout_s`, the connection
is lost, with SourceTimeout.
"""

from __future__ import annotations

import contextlib
import select
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import trio

from imgfs.errors import (
    AccessDenied,
    ImgfsError,
    ProtocolViolation,
    SourceTimeout,
    SourceUnreachable,
    UnsupportedFeature,
)
from imgfs.image import Buffer
from imgfs.sources.base import Broken
from imgfs.sources.nbd.errors import connection_error, library, option_error
from imgfs.sources.nbd.requests import ALLOCATION, Change, Done, Read, Request, Status
from imgfs.url.nbd import NbdUrl

BURST = 16  # replies that are taken before other tasks have their turn
MOST_READ = 32 << 20  # what every server takes: proto.md, "Block size constraints"
MOST_MINIMUM = 64 << 10


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of an export; a reconnect must find the same."""

    size: int  #: bytes
    flags: tuple[bool, ...]
    minimum: int  #: of an offset and a length, bytes; a power of two
    preferred: int
    most: int  #: longest read, bytes
    multi_conn: bool
    has_extents: bool

    @property
    def is_read_only(self) -> bool:
        return self.flags[0]

    @property
    def can_flush(self) -> bool:
        return self.flags[2]

    @property
    def can_fua(self) -> bool:
        return self.flags[3]

    @property
    def can_zero(self) -> bool:
        return self.flags[5]


class Connection:
    """Made by `connect`; then `drive` must run in a task of its own."""

    def __init__(self, url: NbdUrl, name: str, timeout_s: float) -> None:
        self.where = name
        self.lost: SourceUnreachable | ImgfsError | None = None
        self.facts: Facts
        self._nbd = library()
        self._url = url
        self._timeout_s = timeout_s
        self._handle: Any = self._nbd.NBD()
        self._guard = threading.Lock()  # of the handle, between this thread and the one that dials
        self._is_dialing = False
        self._poll = select.epoll()
        self._watched: tuple[int, int] | None = None
        self._requests: set[Request] = set()
        self._patience = trio.CancelScope()
        self._driven = False

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    async def connect(self, *, extents: bool) -> None:
        """Connect and agree on the export; then `facts` is set.

        Raises ImgfsError for good, or Broken when a later attempt may succeed.  In every case but
        success, cancellation too, nothing is left.
        """
        connected = False
        try:
            with self._errors():
                with trio.fail_after(self._timeout_s):
                    await self._connect(extents)
                self.facts = self._learn(extents)
            connected = True
        except trio.TooSlowError:
            said = SourceTimeout(f"{self.where}: does not answer in {self._timeout_s:g} s")
            raise Broken(said) from None
        finally:
            if not connected:
                self.end(SourceUnreachable(f"{self.where}: not connected"))
                self._poll.close()

    async def drive(self) -> None:
        """Move the connection on until it is lost, or cancelled.  Raises only Cancelled."""
        why: SourceUnreachable | ImgfsError = SourceUnreachable(f"{self.where}: was closed")
        self._driven = True
        try:
            with self._patience, self._errors():
                while await self._turn():
                    pass
                why = SourceUnreachable(f"{self.where}: the server ended the connection")
            if self._patience.cancelled_caught:
                why = SourceTimeout(f"{self.where}: no answer in {self._timeout_s:g} s")
        except Broken as exc:
            why = exc.error
        except ImgfsError as exc:
            why = exc
        finally:
            self.end(why)
            self._poll.close()

    def read(self, view: memoryview, offset: int, done: Done) -> None:
        """Read into all of `view`, which nobody else touches until `done` is called.

        Raises Broken when the connection is lost already; then `done` is not called.
        """
        request = Read(self, offset, len(view), done)

        def issue(handle: Any) -> None:
            # Not as an nbd.Buffer: libnbd 1.14 never lets go of what is in one.
            handle.aio_pread_structured(view, offset, request.chunk, request.completed)

        self._issue(request, issue)

    def status(self, offset: int, length: int, done: Done) -> Status:
        """Ask for base:allocation; the answer's entries are there when `done` was called.

        Raises as `read` does.
        """
        request = Status(self, offset, length, self.facts.size - offset, done)

        def issue(handle: Any) -> None:
            handle.aio_block_status(length, offset, request.extent, request.completed)

        self._issue(request, issue)
        return request

    def write(self, data: Buffer, offset: int, fua: bool, done: Done) -> None:
        """Write all of `data`, which must not change until `done` is called.  Raises as `read`."""
        request = Change(self, f"write of {len(data)} bytes at {offset}", done)

        def issue(handle: Any) -> None:
            handle.aio_pwrite(data, offset, request.completed, self._fua(fua))

        self._issue(request, issue)

    def zero(self, offset: int, length: int, fua: bool, done: Done) -> None:
        """NBD_CMD_WRITE_ZEROES, which may make a hole.  Raises as `read`."""
        request = Change(self, f"write of {length} zeroes at {offset}", done)

        def issue(handle: Any) -> None:
            handle.aio_zero(length, offset, request.completed, self._fua(fua))

        self._issue(request, issue)

    def flush(self, done: Done) -> None:
        """What was answered before is durable with this answer.  Raises as `read`."""
        request = Change(self, "flush", done)
        self._issue(request, lambda handle: handle.aio_flush(request.completed))

    def _fua(self, wanted: bool) -> int:
        return int(self._nbd.CMD_FLAG_FUA) if wanted else 0

    def answered(self, request: Request) -> None:
        """For requests only."""
        self._requests.discard(request)
        patience = self._timeout_s if self._requests else float("inf")
        self._patience.deadline = trio.current_time() + patience

    def end(self, why: SourceUnreachable | ImgfsError) -> None:
        """Give the connection up; whoever waits on it hears why."""
        if self.lost is not None:
            return
        self.lost = why
        with self._guard:
            handle, self._handle = self._handle, None
            is_dialing = self._is_dialing
        if not is_dialing:
            with contextlib.suppress(self._nbd.Error):
                if handle.aio_is_ready():
                    handle.aio_disconnect(0)
        # Not libnbd's: it forgets those that are in flight when it is closed.
        broken = Broken(why if isinstance(why, SourceUnreachable) else SourceUnreachable(str(why)))
        error = broken if isinstance(why, SourceUnreachable) else why
        for request in list(self._requests):
            request.end(error)
        self._patience.cancel()
        if not is_dialing:
            _close(handle)

    def _issue(self, request: Request, issue: Callable[[Any], None]) -> None:
        if self.lost is not None:
            raise Broken(SourceUnreachable(f"{self.where}: the connection was lost"))
        if not self._requests:
            self._patience.deadline = trio.current_time() + self._timeout_s
        self._requests.add(request)
        try:
            with self._errors():
                issue(self._handle)
        except BaseException:
            self._requests.discard(request)
            raise
        if not self._watch():
            # Sending it failed, which libnbd does not say.
            self.end(SourceUnreachable(f"{self.where}: the connection was lost"))

    async def _connect(self, extents: bool) -> None:
        # No local name for the handle here: a traceback would keep it, and the socket, alive.
        self._prepare(extents)
        await trio.to_thread.run_sync(self._dial, abandon_on_cancel=True)
        await self._while_connecting()
        if self._handle.aio_is_negotiating():
            refused: list[int] = []

            def answered(error: Any) -> int:
                refused.append(error.value)
                return 1

            self._handle.aio_opt_go(answered)
            await self._while_connecting()
            if refused and refused[0]:
                raise option_error(self.where, refused[0], tls=self._url.tls)
        if not self._handle.aio_is_ready():
            if self._url.tls:
                raise AccessDenied(f"{self.where}: the server has no TLS; without it use nbd://")
            raise Broken(SourceUnreachable(f"{self.where}: the server ended the connection"))

    def _prepare(self, extents: bool) -> None:
        handle, url = self._handle, self._url
        # Option mode, because only there a refusal has a number.
        handle.set_opt_mode(True)
        handle.set_uri_allow_local_file(True)
        handle.set_pread_initialize(False)  # `Read` proves that all of it was sent
        # The last bytes of an image may be no whole block; the server decides on those.
        handle.set_strict_mode(handle.get_strict_mode() & ~self._nbd.STRICT_ALIGN)
        if extents:
            handle.add_meta_context(ALLOCATION)
        if url.verify_peer is not None:
            handle.set_tls_verify_peer(url.verify_peer)
        if url.tls_hostname is not None:
            if not hasattr(handle, "set_tls_hostname"):
                said = f"tls-hostname needs libnbd 1.22; this is {handle.get_version()}"
                raise UnsupportedFeature(f"{self.where}: {said}")
            handle.set_tls_hostname(url.tls_hostname)

    def _dial(self) -> None:
        """[blocks]"""
        with self._guard:
            handle = self._handle
            if handle is None:
                return  # abandoned before it began
            self._is_dialing = True
        try:
            handle.aio_connect_uri(self._url.uri)
        finally:
            with self._guard:
                self._is_dialing = False
                is_abandoned = self._handle is None
            if is_abandoned:
                _close(handle)

    async def _while_connecting(self) -> None:
        while self._handle.aio_is_connecting():
            # Another address is another socket, which may have the number of the last one.
            self._watched = None
            if not await self._turn():
                raise ProtocolViolation(f"{self.where}: libnbd waits for nothing")

    async def _turn(self) -> bool:
        """Wait until the socket is ready, and let libnbd have what has come.

        False: there is nothing to wait for any more.
        """
        direction = self._watch()
        if not direction:
            return False
        await trio.lowlevel.wait_readable(self._poll.fileno())
        for _ in range(BURST if self._driven else 1):
            ready = self._poll.poll(0)
            if self._handle is None or not ready:
                break
            # An error of the socket is for whichever side libnbd wants to go on with.
            if direction & self._nbd.AIO_DIRECTION_READ and ready[0][1] != select.EPOLLOUT:
                self._handle.aio_notify_read()
            else:
                self._handle.aio_notify_write()
            direction = self._watch() if self._driven else 1
            if not direction:
                return False
        return True

    def _watch(self) -> int:
        """Watch for what libnbd wants of the socket, and tell it; 0 when that is over."""
        handle = self._handle
        direction: int = handle.aio_get_direction() if handle is not None else 0
        if not direction:
            return 0
        if self._watched is not None and self._watched[1] == direction:
            return direction
        fd = self._watched[0] if self._watched else handle.aio_get_fd()
        wanted = select.EPOLLIN if direction & self._nbd.AIO_DIRECTION_READ else 0
        wanted |= select.EPOLLOUT if direction & self._nbd.AIO_DIRECTION_WRITE else 0
        try:
            self._poll.modify(fd, wanted)
        except FileNotFoundError:
            self._poll.register(fd, wanted)
        self._watched = (fd, direction)
        return direction

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raises libnbd's as ImgfsError or Broken."""
        try:
            yield
        except self._nbd.Error as exc:
            raise connection_error(self.where, exc) from exc

    def _learn(self, extents: bool) -> Facts:
        handle, nbd = self._handle, self._nbd
        minimum = handle.get_block_size(nbd.SIZE_MINIMUM) or 1
        most = min(handle.get_block_size(nbd.SIZE_MAXIMUM) or MOST_READ, MOST_READ)
        preferred = handle.get_block_size(nbd.SIZE_PREFERRED) or minimum
        if minimum & (minimum - 1) or minimum > MOST_MINIMUM or most < minimum:
            said = f"block sizes of {minimum} to {most} bytes are none"
            raise ProtocolViolation(f"{self.where}: {said}")
        flags = (
            handle.is_read_only(),
            handle.is_rotational(),
            handle.can_flush(),
            handle.can_fua(),
            handle.can_trim(),
            handle.can_zero(),
            handle.can_df(),
        )
        return Facts(
            size=handle.get_size(),
            flags=flags,
            minimum=minimum,
            preferred=min(preferred, most),
            most=most - most % minimum,
            multi_conn=handle.can_multi_conn(),
            has_extents=extents and handle.can_meta_context(ALLOCATION),
        )


def _close(handle: Any) -> None:
    """Close the socket, and let go of what the handle refers to; nobody is in a call of it."""
    # libnbd 1.14 has no such call: there that is done with the last reference.
    if hasattr(handle, "close"):
        handle.close()
