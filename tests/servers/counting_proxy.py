"""A TCP proxy on loopback that counts what crosses it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time

PIPE = 1 << 20


class _Pump:
    """One direction of one connection; `count` is the bytes delivered."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.count = 0
        self._source = source
        self._sink = sink
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        # splice neither copies through Python nor holds the GIL.
        readable, writable = os.pipe()
        try:
            fcntl.fcntl(writable, fcntl.F_SETPIPE_SZ, PIPE)
            while ready := os.splice(self._source.fileno(), writable, PIPE):
                while ready:
                    moved = os.splice(readable, self._sink.fileno(), ready)
                    self.count += moved
                    ready -= moved
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One end is gone: the other must hear of it, in both directions.
            for each in (self._source, self._sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        finally:
            os.close(readable)
            os.close(writable)


class CountingProxy:
    """Listens on `port` of 127.0.0.1 and connects on to `target` there, until it is closed.

    `up` and `down` are the bytes of TCP payload so far, from and to the clients.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._ups: list[_Pump] = []
        self._downs: list[_Pump] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def up(self) -> int:
        return sum(pump.count for pump in self._ups)

    @property
    def down(self) -> int:
        return sum(pump.count for pump in self._downs)

    def wait_idle(self, timeout_s: float = 10) -> None:
        """Return when every connection has ended.  Raises TimeoutError when one does not."""
        deadline = time.monotonic() + timeout_s
        for pump in (*self._ups, *self._downs):
            pump.thread.join(max(0, deadline - time.monotonic()))
            if pump.thread.is_alive():
                raise TimeoutError("a connection through the proxy is still open")

    def close(self) -> None:
        """End every connection.  Raises TimeoutError when a thread does not end."""
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self.wait_idle()
        for each in (self._listener, *self._sockets):
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            self._ups.append(_Pump(client, server))
            self._downs.append(_Pump(server, client))
