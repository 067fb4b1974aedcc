"""Workers that go on by themselves, and all stop now and then for somebody who looks."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable

PATIENCE_S = 180.0
SLOW_S = 45.0  # a step that is worth a line


class Gate:
    """Closed by one, passed by all workers between their steps."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._closed = False
        self._waiting = 0
        self.is_over = False
        self.keeps = False  #: what is there is left there, to be seen in a new mount
        self.failures: list[str] = []

    @property
    def is_closed(self) -> bool:
        return self._closed or self.is_over

    def wait(self) -> None:
        with self._condition:
            self._waiting += 1
            self._condition.notify_all()
            while self._closed and not self.is_over:
                self._condition.wait()
            self._waiting -= 1

    def close(self, workers: int) -> None:
        """Returns when all wait.  Raises TimeoutError."""
        with self._condition:
            self._closed = True
            everybody = self._condition.wait_for(
                lambda: self._waiting == workers or self.is_over, PATIENCE_S
            )
        if not everybody:
            raise TimeoutError("a worker does not come back")

    def open(self) -> None:
        with self._condition:
            self._closed = False
            self._condition.notify_all()

    def end(self) -> None:
        with self._condition:
            self.is_over = True
            self._condition.notify_all()

    def fail(self, who: str, what: str) -> None:
        self.failures.append(f"{who}: {what}")
        self.end()

    def sleep(self, seconds: float) -> None:
        """Shorter when all are to stop."""
        end = time.monotonic() + seconds
        while not self.is_closed and time.monotonic() < end:
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))


class Worker(threading.Thread):
    """Does one step after the other; `settle` leaves nothing that a leak could be taken for."""

    def __init__(self, name: str, gate: Gate, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.gate = gate
        self.rng = random.Random(f"{seed} {name}")
        self.steps = 0
        self.begun = time.monotonic()
        self.doing = ""
        self.counts: dict[str, int] = {}

    def step(self) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        pass

    def note(self, what: str) -> None:
        """Say what is done now: for who counts, and for who finds it stuck."""
        taken = time.monotonic() - self.begun
        if taken > SLOW_S and self.doing != "wait":
            print(f"  {self.name}: {taken:.0f} s for {self.doing}", flush=True)
        self.doing = what
        self.begun = time.monotonic()
        kind = what.split(" ")[0]
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def any_of(self, *actions: Callable[[], None]) -> None:
        self.rng.choice(actions)()

    def run(self) -> None:
        try:
            while not self.gate.is_over:
                if self.gate.is_closed:
                    self.note("settle")
                    self.settle()
                    self.note("wait")
                    self.gate.wait()
                    self.begun = time.monotonic()  # how long the others took is not its doing
                    continue
                self.step()
                self.steps += 1
        except BaseException:
            self.gate.fail(self.name, f"{self.doing}\n{traceback.format_exc()}")
