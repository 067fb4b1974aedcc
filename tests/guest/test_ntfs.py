"""The free space of NTFS is what partclone and ntfsinfo say, and what is left is whole."""

from __future__ import annotations

import contextlib
import os
import random
import re
import struct
import subprocess
import time
from array import array
from pathlib import Path

import pytest

from imgfs.guest import ntfs
from imgfs.guest.space import Filesystem
from tests.drive import Files, size_of
from tests.guest.contents import checksums, churn, zero
from tests.guest.ntfs_images import Image, make, mounted, non_resident, resident

LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
MIB = 1 << 20
MFT, BITMAP = 0, 6
ATTRIBUTE_LIST, DATA = 0x20, 0x80


def look(image: Path | bytes | bytearray) -> Filesystem:
    return Files(image).run(ntfs.look(0, size_of(image)))


def partclone_free(image: Path) -> array[int]:
    """From the log that it makes for ddrescue: what it would not copy."""
    log = image.with_suffix(".domain")
    command = ["partclone.ntfs", "-D", "-q", "-s", image, "-o", log, "-L", "/dev/null"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    found = array("Q")
    for at, length, status in re.findall(r"(0x\w+)\s+(0x\w+)\s+([+?])", log.read_text()):
        if status == "?":
            found.extend((int(at, 16), int(at, 16) + int(length, 16)))
    return found


def ntfsinfo(image: Path) -> dict[str, str]:
    command = ["ntfsinfo", "-m", "-f", image]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    # The first that is so called: of $MFT, where it is said of several files.
    return dict(reversed(re.findall(r"^\s*([^:\n]+):\s*(.*)$", run.stdout, re.M)))


def check_against_tools(image: Path, found: Filesystem) -> None:
    assert not found.left_whole
    info = ntfsinfo(image)
    cluster = int(info["Cluster Size"])
    free = int(info["Free Clusters"].split()[0]) * cluster
    assert sum(found.free[1::2]) - sum(found.free[::2]) == free
    assert found.used == int(info["Volume Size in Clusters"]) * cluster - free
    assert found.label == info["Volume Name"]
    assert found.free == partclone_free(image)


def check_zeroed(image: Path, found: Filesystem, content: dict[str, str]) -> None:
    """With all that is free overwritten it is whole: every record of the MFT is walked, the
    clusters of all files are compared with $Bitmap, and the files are read."""
    zero(image, found.free)
    for check in (["ntfsresize", "--info", "--force"], ["ntfsfix", "--no-action"]):
        subprocess.run([*check, image], check=True, capture_output=True, timeout=60)
    with mounted(image) as root:
        assert checksums(root) == content


@pytest.mark.parametrize("seed", range(60 if LONG else 4))
def test_random_options(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    sector = rng.choice((512, 512, 1024, 2048, 4096))
    cluster = sector << rng.randrange(9)
    if seed == 1:
        sector, cluster = 512, 2 * MIB
    elif seed == 2:
        sector, cluster = 4096, 4096
    size = rng.randrange(20, 60) * MIB + rng.randrange(9) * 4096 + 40 * cluster
    options = ["-s", str(sector), "-c", str(cluster), "-L", f"seed {seed}"]
    image = make(tmp_path / "a.img", size, *options)
    with mounted(image) as root:
        churn(root, rng, 10 * MIB)
    with mounted(image) as root:
        content = checksums(root)
    found = look(image)
    assert found.size <= size and found.kind == "ntfs" and len(content) > 5
    check_against_tools(image, found)
    check_zeroed(image, found, content)


def test_mft_in_many_pieces(tmp_path: Path) -> None:
    """It has an attribute list then, and its own records say where they are."""
    image = make(tmp_path / "a.img", 24 * MIB, "-c", "512", "-L", "pieces")
    with mounted(image) as root:
        with contextlib.suppress(OSError):
            for index in range(6000):
                (root / f"{index}").write_bytes(b"x" * 5000)
        for index in range(0, 6000, 3):
            (root / f"{index}").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for index in range(6000):
                (root / f"long {index} {'n' * 180}").write_bytes(b"x" * 400)
        for index in range(0, 6000, 5):
            (root / f"long {index} {'n' * 180}").unlink(missing_ok=True)
    with mounted(image) as root:
        content = checksums(root)
    assert int(ntfsinfo(image)["Number of Attached Extent Inodes"]) > 0
    found = look(image)
    check_against_tools(image, found)
    check_zeroed(image, found, content)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With some files."""
    image = make(tmp_path_factory.mktemp("ntfs") / "base.img", 24 * MIB, "-L", "Grüße")
    with mounted(image) as root:
        churn(root, random.Random(1), 6 * MIB, steps=120)
    return image


def test_label_and_serial_number(base: Path) -> None:
    found = look(base)
    command = ["blkid", "-p", "-o", "value", "-s", "LABEL", "-s", "UUID", base]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert run.stdout.split() == [found.label, found.uuid] and found.label == "Grüße"


def test_copy_of_the_boot_sector_and_what_follows_stay(base: Path) -> None:
    found = look(base.read_bytes() + bytes(MIB))
    assert found.size == 24 * MIB and found.free == look(base).free
    assert found.free[-1] <= 24 * MIB - 512


def test_inside_of_a_disk(base: Path) -> None:
    start = 3 * MIB + 512
    disk = Files(bytes(start) + base.read_bytes() + b"\xff" * MIB)
    assert disk.run(ntfs.look(start, 24 * MIB)) == look(base)


def test_terabyte(tmp_path: Path) -> None:
    image = make(tmp_path / "a.img", 1 << 40)
    files = Files(image)
    began = time.monotonic()
    found = files.run(ntfs.look(0, 1 << 40))
    assert time.monotonic() - began < 3
    assert files.reads < 15
    assert not found.left_whole and found.used is not None and found.used < 200 * MIB


def test_bitmap_in_two_runs(base: Path) -> None:
    """By hand, as are those below: mkntfs always writes it in one.  Its second half moves."""
    image = Image(base)
    boot, free = image.boot, look(base).free
    first, count = image.clusters(BITMAP, DATA)
    assert count == 1
    one, other = (at // boot.cluster for at in (free[0], free[2]))
    bits = image.data[first * boot.cluster :][: boot.cluster]
    for cluster in (one, other):
        bits[cluster // 8] |= 1 << cluster % 8
    # Two clusters are more than it needs here, so the filesystem has to grow for this.
    size = 8 * boot.cluster * boot.cluster + MIB
    struct.pack_into("<Q", image.data, 40, size // boot.sector)
    image.data += bytes(size + boot.sector - len(image.data))
    grown = bytearray(2 * boot.cluster)
    grown[: len(bits)] = bits
    clusters = image.boot.clusters
    for cluster in range(24 * MIB // boot.cluster - 1, 8 * boot.cluster):
        grown[cluster // 8] |= 1 << cluster % 8
    image.put(one * boot.cluster, grown[: boot.cluster])
    image.put(other * boot.cluster, grown[boot.cluster :])
    length = -(-clusters // 64) * 8
    runs = non_resident(DATA, length, boot.cluster, (1, one), (1, other))
    image.replace(BITMAP, DATA, runs)
    found = look(image.data)
    assert not found.left_whole
    assert found.free[-2:].tolist() == [8 * boot.cluster**2, clusters * boot.cluster]
    taken = {one * boot.cluster, other * boot.cluster}
    assert not taken & set(found.free[::2])
    assert found.free[0] == free[0] + boot.cluster or free[1] == free[0] + boot.cluster


@pytest.mark.parametrize("how", ["hole", "resident", "listed"])
def test_bitmap_otherwise(tmp_path: Path, how: str) -> None:
    cluster = 65536 if how == "resident" else 512
    image = Image(make(tmp_path / "a.img", 24 * MIB, "-c", str(cluster)))
    expected = look(image.data).free
    first, count = image.clusters(BITMAP, DATA)
    size = -(-image.boot.clusters // 64) * 8
    start = first * cluster
    if how == "hole":
        clear = [at for at in range(count) if not any(image.data[start + at * cluster :][:cluster])]
        hole = clear[0]
        image.put(start + hole * cluster, b"\xff" * cluster)
        runs = ((hole, first), (1, None), (count - hole - 1, first + hole + 1))
        attribute = non_resident(DATA, size, cluster, *runs)
    elif how == "resident":
        attribute = resident(DATA, bytes(image.data[start : start + size]))
    else:
        entry = struct.pack("<IHBBQQH6x", DATA, 32, 0, 26, 0, BITMAP | BITMAP << 48, 9)
        attribute = resident(ATTRIBUTE_LIST, entry)
        attribute += non_resident(DATA, size, cluster, (count, first))
    image.replace(BITMAP, DATA, attribute)
    found = look(image.data)
    assert (found.left_whole, found.free) == ("", expected)
