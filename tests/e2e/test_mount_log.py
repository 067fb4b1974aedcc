"""What a mount in the foreground logs of an image that cannot be read: once, and not for ever."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

from tests.mounts import IMGFS


def test_a_bad_image_is_told_of_once(tmp_path: Path) -> None:
    pool, point = tmp_path / "pool", tmp_path / "point"
    pool.mkdir()
    point.mkdir()
    (pool / "bad.qcow2").write_bytes(b"QFI\xfb\0\0\0\3".ljust(4096, b"\xff"))
    (pool / "worse.qcow2").write_bytes(b"QFI\xfb\0\0\0\x09".ljust(4096, b"\xff"))
    command = [*IMGFS, "-f", f"{pool}/", str(point)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not (point / ".imgfs").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(3):
            for name in ("bad", "worse"):
                for path in sorted((point / name).iterdir()):
                    with contextlib.suppress(OSError):
                        path.stat()
        subprocess.run(["fusermount3", "-u", point], check=True, timeout=20)
        said = process.communicate(timeout=20)[1].splitlines()
    finally:
        process.kill()
        process.wait()
    for name in ("bad", "worse"):
        lines = [line for line in said if f"{name}.qcow2: " in line]
        assert 1 <= len(lines) <= 2, said  # at most once for lookup, and once for open
        assert len(set(lines)) == len(lines)
        assert not any("imgfs.fuse" in line for line in lines)
