"""A small NBD server whose methods tests override, to have one that breaks the rules.

Newstyle handshake, structured replies and base:allocation as in proto.md; read-only; no TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Callable

OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY = 0x3E889045565A9
REQUEST = 0x25609513
SIMPLE_REPLY = 0x67446698
STRUCTURED_REPLY = 0x668E33EF
ABORT, STARTTLS, GO, STRUCTURED, META = 2, 5, 7, 8, 10
ACK, INFO, META_REPLY = 1, 3, 4
UNSUPPORTED, UNKNOWN = (1 << 31) + 1, (1 << 31) + 6
READ, DISCONNECT, STATUS = 0, 2, 7
DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE, BLOCK_STATUS, ERROR = 0, 1, 2, 5, (1 << 15) + 1
MULTI_CONN = 1 << 8
CONTEXT = 7


class Session:
    """One connection."""

    def __init__(
        self, server: PythonNbd, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer

    async def run(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            if await self.handshake():
                while await self.request():
                    await self.writer.drain()
        self.writer.close()

    def send(self, form: str, *values: object) -> None:
        self.writer.write(struct.pack(">" + form, *values))

    async def receive(self, form: str) -> tuple[int, ...]:
        size = struct.calcsize(">" + form)
        return struct.unpack(">" + form, await self.reader.readexactly(size))

    async def handshake(self) -> bool:
        self.writer.write(b"NBDMAGICIHAVEOPT")
        self.send("H", 3)
        await self.receive("L")
        while True:
            _, option, length = await self.receive("QLL")
            await self.reader.readexactly(length)
            if option == STRUCTURED:
                self.option(option, ACK)
            elif option == META:
                self.option(option, META_REPLY, struct.pack(">L", CONTEXT) + b"base:allocation")
                self.option(option, ACK)
            elif option == GO:
                self.go(option)
                return True
            elif option == ABORT:
                return False
            else:
                self.option(option, UNSUPPORTED)

    def option(self, option: int, reply: int, payload: bytes = b"") -> None:
        self.send("QLLL", OPTION_REPLY, option, reply, len(payload))
        self.writer.write(payload)

    def go(self, option: int) -> None:
        size, flags = self.server.size, self.server.flags
        self.option(option, INFO, struct.pack(">HQH", 0, size, flags))
        if self.server.blocks:
            self.option(option, INFO, struct.pack(">HLLL", 3, *self.server.blocks))
        self.option(option, ACK)

    async def request(self) -> bool:
        _, _, kind, cookie, offset, length = await self.receive("LHHQQL")
        if kind == DISCONNECT:
            return False
        self.server.requests.append((kind, offset, length))
        if kind == READ:
            await self.read(cookie, offset, length)
        else:
            await self.status(cookie, offset, length)
        return True

    async def read(self, cookie: int, offset: int, length: int) -> None:
        self.data(cookie, offset, self.server.data[offset : offset + length])

    async def status(self, cookie: int, offset: int, length: int) -> None:
        self.extents(cookie, [length, 0])

    def data(self, cookie: int, offset: int, data: bytes, flags: int = DONE) -> None:
        self.chunk(cookie, OFFSET_DATA, struct.pack(">Q", offset) + data, flags)

    def extents(self, cookie: int, entries: list[int], context: int = CONTEXT) -> None:
        self.chunk(cookie, BLOCK_STATUS, struct.pack(f">{len(entries) + 1}L", context, *entries))

    def chunk(self, cookie: int, kind: int, payload: bytes = b"", flags: int = DONE) -> None:
        self.send("LHHQL", STRUCTURED_REPLY, flags, kind, cookie, len(payload))
        self.writer.write(payload)


class PythonNbd:
    """Serves `data` on a port of 127.0.0.1, in a thread, until it is closed."""

    def __init__(
        self,
        data: bytes,
        session: type[Session] = Session,
        *,
        size: int | None = None,
        flags: int = 3,
        blocks: tuple[int, int, int] | None = None,
    ) -> None:
        self.data = data
        self.size = len(data) if size is None else size
        self.flags = flags
        self.blocks = blocks
        self.session = session
        self.requests: list[tuple[int, int, int]] = []
        self.connections = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._writers: list[asyncio.StreamWriter] = []
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait(10)

    @property
    def url(self) -> str:
        return f"nbd://127.0.0.1:{self.port}/"

    def cut(self) -> None:
        """End every connection."""
        self._call(lambda: [writer.transport.abort() for writer in self._writers])

    def close(self) -> None:
        self.cut()
        self._call(self._loop.stop)
        self._thread.join(10)

    def _call(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def _run(self, ready: threading.Event) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            self._writers.append(writer)
            await self.session(self, reader, writer).run()

        async def start() -> asyncio.Server:
            return await asyncio.start_server(serve, "127.0.0.1", 0)

        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(start())
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        rest = asyncio.all_tasks(self._loop)
        for task in rest:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        self._loop.close()
