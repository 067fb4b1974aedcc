"""What the proxies have in common: they listen on loopback, and pump both ways what comes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol


class Pump(Protocol):
    """One direction of one connection; `count` is what it has delivered, in bytes."""

    @property
    def count(self) -> int: ...

    @property
    def threads(self) -> Sequence[threading.Thread]: ...


class Proxy(ABC):
    """Listens on `port` of 127.0.0.1 and connects on to `target` there, until it is closed.

    `up` and `down` are the bytes of TCP payload delivered so far, from and to the clients.
    `receive_buffer` is the size of its sockets' buffers, in bytes; None: the kernel's choice.
    """

    def __init__(self, target: int, receive_buffer: int | None = None) -> None:
        self._target = target
        self._receive_buffer = receive_buffer
        self._listener = self._socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._ups: list[Pump] = []
        self._downs: list[Pump] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @abstractmethod
    def _pumps(self, client: socket.socket, server: socket.socket) -> tuple[Pump, Pump]:
        """Of a new connection: up, down."""

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
            for thread in pump.threads:
                thread.join(max(0, deadline - time.monotonic()))
                if thread.is_alive():
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

    def _socket(self) -> socket.socket:
        sock = socket.socket()
        if self._receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        return sock

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = self._socket()
            try:
                server.connect(("127.0.0.1", self._target))
            except OSError:
                client.close()
                server.close()
                continue
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            up, down = self._pumps(client, server)
            self._ups.append(up)
            self._downs.append(down)
