"""An image has writers or snapshots, and never both."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import Mount

Mounter = Callable[..., Mount]


def test_snapshots_and_writers_exclude_each_other(mount: Mounter, sparse: Path) -> None:
    point = mount(sparse, "-o", "write=through").point
    raw, snapshot = point / "disk.raw", point / "snapshots/work"
    with raw.open("r+b", buffering=0) as file:
        file.write(b"by a writer")
        with pytest.raises(OSError) as caught:
            snapshot.mkdir()
        assert caught.value.errno == errno.EBUSY
    snapshot.mkdir()
    for change in (lambda: raw.open("r+b"), lambda: os.truncate(raw, 5)):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EBUSY
    with (snapshot / "work.raw").open("r+b", buffering=0) as file:
        assert file.read(11) == b"by a writer"
        os.pwrite(file.fileno(), b"in it", 0)
    assert sparse.read_bytes()[:11] == b"by a writer"
    snapshot.rmdir()
    with raw.open("r+b", buffering=0) as file:
        file.write(b"again")
    assert sparse.read_bytes()[:5] == b"again"
