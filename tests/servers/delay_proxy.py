"""A TCP proxy on loopback that delays what crosses it and limits how much does.

    socket -> paced at the rate, all connections together -> held for the delay -> socket

What is on its way takes as long as on a real line, and is bounded like there: the proxy takes
from a sender only what the line has room for.  Its sockets' buffers are small on the side that it
reads from, so that little queues in front of the line; what the receiver does not take waits in the
proxy, so that no window of TCP's is ever the limit.  Not modelled: loss, slow start.

    .venv/bin/python -m tests.servers.delay_proxy      what the proxy itself can carry
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

from tests.servers.proxy import Proxy

CHUNK = 128 << 10
QUEUE = 256 << 10  # of the socket that is read from
CATCH_UP_S = 0.02  # so long a pump that was not woken in time makes up for it


class _Line:
    """One direction, for all connections."""

    def __init__(self, delay_s: float, rate: float | None) -> None:
        self._delay_s = delay_s
        self._rate = rate
        self._free_at = 0.0
        self._lock = threading.Lock()

    def send(self, length: int) -> tuple[float, float]:
        """When so many bytes have left, and when they arrive."""
        now = time.monotonic()
        with self._lock:
            if self._rate is None:
                return now, now + self._delay_s
            self._free_at = max(self._free_at, now - CATCH_UP_S) + length / self._rate
            left = max(now, self._free_at)
        return left, left + self._delay_s


class _Pump:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, line: _Line) -> None:
        self.count = 0
        self._source = source
        self._sink = sink
        self._line = line
        self._way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=each, daemon=True) for each in (self._take, self._deliver)
        ]
        for thread in self.threads:
            thread.start()

    def _take(self) -> None:
        data = b"-"
        while data:
            try:
                data = self._source.recv(CHUNK)
            except OSError:
                data = b""
            left, arrives = self._line.send(len(data))
            self._way.put((arrives, data))
            time.sleep(max(0.0, left - time.monotonic()))

    def _deliver(self) -> None:
        try:
            while True:
                arrives, data = self._way.get()
                time.sleep(max(0.0, arrives - time.monotonic()))
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._sink.sendall(data)
                self.count += len(data)
        except OSError:
            # One end is gone: the other must hear of it, in both directions.
            for each in (self._source, self._sink):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


class DelayProxy(Proxy):
    """`round_trip_s` is split evenly between the directions; `rate` is bytes a second in each of
    them, None for no limit.
    """

    def __init__(self, target: int, round_trip_s: float, rate: float | None = None) -> None:
        self._lines = [_Line(round_trip_s / 2, rate) for _ in range(2)]
        super().__init__(target, receive_buffer=QUEUE)

    def _pumps(self, client: socket.socket, server: socket.socket) -> tuple[_Pump, _Pump]:
        return _Pump(client, server, self._lines[0]), _Pump(server, client, self._lines[1])


def carried(round_trip_s: float, rate: float | None, total: int) -> float:
    """Bytes a second that cross a proxy to a client that only takes them, first byte to last."""
    got, buffer = 0, bytearray(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for _ in range(total >> 20):
                    connection.sendall(bytes(1 << 20))

        threading.Thread(target=serve, daemon=True).start()
        proxy = DelayProxy(listener.getsockname()[1], round_trip_s, rate)
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            got = first = client.recv_into(buffer)
            begun = time.perf_counter()
            while count := client.recv_into(buffer):
                got += count
            seconds = time.perf_counter() - begun
        proxy.close()
    assert got == total
    return (got - first) / seconds


if __name__ == "__main__":
    for milliseconds in (0, 20, 200):
        for name, limit in (("1 Gbit/s", 125e6), ("unlimited", None)):
            begun, busy = time.perf_counter(), time.process_time()
            found = carried(milliseconds / 1e3, limit, 1 << 30)
            share = (time.process_time() - busy) / (time.perf_counter() - begun)
            print(f"{milliseconds:4} ms, {name:9}: {found / 1e6:6.0f} MB/s, {share:.0%} of a core")
