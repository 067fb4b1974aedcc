"""A qemu without a machine, whose block layer does what QMP asks."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

WAIT_S = 90


class Qemu:
    """qemu-system with these drives; it ends with the block, and must end well."""

    def __init__(self, directory: Path, *words: str) -> None:
        path = directory / "qmp"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen()
            server.settimeout(WAIT_S)
            command = ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults"]
            command += ["-chardev", f"socket,id=q,path={path}", "-mon", "chardev=q,mode=control"]
            self.process = subprocess.Popen(
                [*command, *words], stderr=subprocess.PIPE, text=True, errors="replace"
            )
            try:
                self._socket, _ = server.accept()
            except BaseException:
                self._kill()
                raise
        self._socket.settimeout(WAIT_S)
        self._lines = self._socket.makefile("rw")
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Qemu:
        json.loads(self._lines.readline())  # its greeting
        self.do("qmp_capabilities")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.do("quit")
                _, said = self.process.communicate(timeout=WAIT_S)
                assert (self.process.returncode, said) == (0, "")
        finally:
            self._lines.close()
            self._socket.close()
            self._kill()

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=WAIT_S)

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:  # it has died, and says why
            _, said = self.process.communicate(timeout=WAIT_S)
            raise AssertionError(f"qemu ended with {self.process.returncode}: {said}")
        said_: dict[str, Any] = json.loads(line)
        return said_

    def do(self, command: str, **arguments: object) -> Any:
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        asked = {"execute": command, **({"arguments": words} if words else {})}
        self._lines.write(json.dumps(asked) + "\n")
        self._lines.flush()
        while "event" in (said := self._next()):
            self.events.append(said)
        assert "error" not in said, said
        return said["return"]

    def wait(self, name: str) -> dict[str, Any]:
        """The data of the next event of this name."""
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name:
                    del self.events[index]
                    data: dict[str, Any] = event.get("data", {})
                    return data
            said = self._next()
            assert "event" in said
            self.events.append(said)

    def job(self, command: str, *, completes: bool, **arguments: object) -> None:
        """A block job, from its beginning to its end.  `completes`: it has to be told to end."""
        self.do(command, **arguments)
        if completes:
            self.wait("BLOCK_JOB_READY")
            self.do("block-job-complete", device=arguments.get("job_id") or arguments["device"])
        ended = self.wait("BLOCK_JOB_COMPLETED")
        assert "error" not in ended, ended
