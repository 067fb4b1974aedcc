"""What is shown of an image has the same bytes in every mount, whatever its cache holds by then."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.formats import qemu
from tests.mounts import MIB, Mount, imgfs
from tests.servers.ssh import Sshd

from .test_mount_formats import SHOWN

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
Mounter = Callable[..., Mount]


def digests(point: Path, *, backwards: bool = False) -> dict[str, str]:
    """Of all that is shown; read in order, or here and there first."""
    names = [point / f"disk{extension}" for extension in (".raw", *SHOWN)]
    names.append(point / "sparse/disk.qcow2")
    found = {}
    for path in reversed(names) if backwards else names:
        if backwards:
            with path.open("rb", buffering=0) as file:
                for at in range(path.stat().st_size // MIB, -1, -1):
                    os.pread(file.fileno(), 4096, at * MIB)
        found[str(path.relative_to(point))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("kind", ["raw", "qcow2"] if LONG else ["qcow2"])
def test_in_every_mount(mount: Mounter, sshd: Sshd, tmp_path: Path, kind: str) -> None:
    image = tmp_path / f"disk.{kind}"
    qemu.img("create", "-q", "-f", kind, image, "24M")
    # Zeroes that are written are found to be zeroes by reading, and not by asking.
    writes = qemu.scribble(random.Random(3), 24 * MIB, 6, MIB)
    qemu.io(image, kind, *writes, "write -P 0 9M 2M")
    before = image.stat()
    url = sshd.url(image)
    file = tmp_path / "images.toml"
    file.write_text(f'[images.disk]\nsource = "{url}"\nreadahead = "off"\ncache_size = "1M"\n')
    found = []
    m = mount(url, "-o", sshd.options)  # cold
    found.append(digests(m.point))
    found.append(digests(m.point))  # warm
    assert imgfs("umount", m.point).returncode == 0
    m = mount(url, "-o", sshd.options)  # kept
    found.append(digests(m.point, backwards=True))
    assert imgfs("umount", m.point).returncode == 0
    assert imgfs("cache", "clear").returncode == 0
    m = mount(file, "-o", sshd.options)
    found.append(digests(m.point / "disk"))  # another readahead, and hardly a cache
    assert len({frozenset(each.items()) for each in found}) == 1, found
    assert image.stat().st_mtime_ns == before.st_mtime_ns
