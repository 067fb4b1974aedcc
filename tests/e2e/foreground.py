"""A mount in the foreground, whose log can be read, and whose limits can be set."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mounts import IMGFS


@dataclass(frozen=True)
class Foreground:
    point: Path
    pid: int
    log: Path

    def text(self) -> str:
        return self.log.read_text()

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def held(self) -> list[str]:
        """Files that were deleted, and are open in it."""
        found = []
        for each in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                found.append(str(each.readlink()))
        return [path for path in found if path.endswith(" (deleted)")]

    def refuse_bugs(self) -> None:
        text = self.text()
        assert "Traceback" not in text and "bug in imgfs" not in text, text


@contextlib.contextmanager
def foreground(
    source: Path | str, directory: Path, *options: str, files: int | None = None
) -> Iterator[Foreground]:
    """With `files` as the limit of descriptors, soft and hard."""
    point, log = directory / "mnt", directory / "log"
    point.mkdir()

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [*IMGFS, "mount", "-f", str(source), str(point), *options]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, preexec_fn=limit
        )
    try:
        until = time.monotonic() + 30
        while not point.is_mount() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert point.is_mount(), log.read_text()
        yield Foreground(point, process.pid, log)
    finally:
        subprocess.run(["fusermount3", "-uzq", str(point)], timeout=20, check=False)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
