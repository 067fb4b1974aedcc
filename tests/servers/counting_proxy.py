"""A TCP proxy on loopback that counts what crosses it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading

from tests.servers.proxy import Proxy

PIPE = 1 << 20


class _Pump:
    """One direction of one connection; `count` is the bytes delivered."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.count = 0
        self._source = source
        self._sink = sink
        thread = threading.Thread(target=self._run, daemon=True)
        self.threads = [thread]
        thread.start()

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


class CountingProxy(Proxy):
    """As `Proxy` says; what it delivers it only splices."""

    def _pumps(self, client: socket.socket, server: socket.socket) -> tuple[_Pump, _Pump]:
        return _Pump(client, server), _Pump(server, client)
