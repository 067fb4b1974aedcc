"""Free space of btrfs that mkfs made and the kernel filled, against a walk of dump-tree's text."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgfs.guest.btrfs import look
from imgfs.guest.space import Filesystem
from tests.drive import Bytes, Files, size_of
from tests.guest.btrfs_trees import add_block_group_tree
from tests.guest.mounted import (
    LONG,
    checksums,
    fragment,
    in_order,
    joined,
    mounted,
    run,
    runs,
    zero_free,
)

MiB = 1 << 20
GiB = 1 << 30
KEPT = [(0, MiB), *((at, at + 65536) for at in (64 * MiB, 256 * GiB))]


def seen(image: Bytes) -> Filesystem:
    found = Files(image).run(look(0, size_of(image)))
    in_order(found)
    return found


def super_fields(image: Path) -> dict[str, str]:
    text = run("btrfs", "inspect-internal", "dump-super", image)
    return dict(re.findall(r"^([\w.]+)[ \t]+(\S+)", text, re.M))


def dumped(image: Path, tree: str) -> str:
    return run("btrfs", "inspect-internal", "dump-tree", "-t", tree, image)


def extents(image: Path, nodesize: int) -> Iterator[tuple[int, int]]:
    key = r"^\titem \d+ key \((\d+) (EXTENT_ITEM|METADATA_ITEM) (\d+)\)"
    for start, kind, length in re.findall(key, dumped(image, "extent"), re.M):
        size = nodesize if kind == "METADATA_ITEM" else int(length)
        yield int(start), int(start) + size


def copies(image: Path) -> list[tuple[int, int, int]]:
    """Of all chunks: (address, length, where on the device), once for each copy."""
    found = []
    for text in dumped(image, "chunk").split("key (FIRST_CHUNK_TREE CHUNK_ITEM ")[1:]:
        address = int(text[: text.index(")")])
        length = int(re.findall(r"length (\d+)", text)[0])
        found += [
            (address, length, int(at))
            for at in re.findall(r"stripe \d+ devid 1 offset (\d+)", text)
        ]
    return found


def free_of_dump(image: Path) -> list[tuple[int, int]]:
    """What of the device no extent uses in any copy, and btrfs does not keep for itself."""
    fields = super_fields(image)
    used = list(extents(image, int(fields["nodesize"])))
    assert sum(end - start for start, end in used) == int(fields["bytes_used"])
    taken = list(KEPT)
    for address, length, at in copies(image):
        taken += [
            (at + start - address, at + end - address)
            for start, end in used
            if address <= start and end <= address + length
        ]
    free, last = [], 0
    total = int(fields["dev_item.total_bytes"])
    for start, end in [*sorted(taken), (total, total)]:
        if last < min(start, total):
            free.append((last, min(start, total)))
        last = max(last, end)
    return joined(iter(free))


def made(path: Path, size: int, *options: object) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    run("mkfs.btrfs", "-q", *options, path)
    return path


def checked(image: Path) -> None:
    run("btrfs", "check", "--readonly", image)


def scrubbed(point: Path) -> None:
    run("btrfs", "scrub", "start", "-B", "-r", point)


def scatter(point: Path, files: int) -> None:
    """So many blocks, every second of them free; the kernel chooses where each lies."""
    paths = [point / f"block {number}" for number in range(files)]
    for path in paths:
        path.write_bytes(os.urandom(4096))
    run("sync", "-f", point)
    said = run("filefrag", "-b4096", "-v", *paths)
    at = [int(each) for each in re.findall(r"^ +0: +0\.\. +0: +(\d+)\.\.", said, re.M)]
    for _, path in sorted(zip(at, paths, strict=True))[::2]:
        path.unlink()


def lived_in(point: Path, rng: random.Random) -> None:
    """Subvolumes, snapshots, clones, files in the tree itself, holes."""
    volume = point / "volume"
    run("btrfs", "subvolume", "create", volume)
    fragment(volume, rng, rng.randint(10, 40) * MiB)
    for number in range(3):
        run("btrfs", "subvolume", "snapshot", volume, point / f"snapshot {number}")
        large = sorted(volume.rglob("*"), key=lambda path: path.lstat().st_size)[-1]
        clone = volume / f"clone {number}"
        run("cp", "--reflink=always", large, clone)
        with clone.open("r+b") as file:
            file.seek(rng.randrange(max(1, large.stat().st_size)))
            file.write(rng.randbytes(rng.randrange(100_000)))
        (volume / f"inline {number}").write_bytes(rng.randbytes(rng.randrange(1, 2000)))
        run("truncate", "-s", "50M", volume / f"sparse {number}")
    run("fallocate", "-l", "5M", volume / "reserved")
    run("btrfs", "subvolume", "delete", "-c", point / "snapshot 1")
    fragment(point, rng, 5 * MiB)
    run("btrfs", "subvolume", "sync", point)


def random_image(path: Path, rng: random.Random) -> tuple[Path, list[str]]:
    """And with what options to mount it."""
    features = [
        name if rng.random() < 0.5 else f"^{name}"
        for name in ("no-holes", "extref", "skinny-metadata")
    ]
    options: list[object] = ["-n", rng.choice([4096, 8192, 16384, 32768, 65536]), "-s", 4096]
    options += ["-O", ",".join(features), "-L", f"label {rng.randrange(100)}"]
    options += ["-R", rng.choice(["free-space-tree", "^free-space-tree"])]
    options += ["--csum", rng.choice(["crc32c", "xxhash", "sha256", "blake2"])]
    options += ["-m", rng.choice(["single", "dup"]), "-d", rng.choice(["single", "single", "dup"])]
    made(path, rng.randint(90_000, 125_000) * 4096, *options)
    if rng.random() < 0.3:
        run("btrfstune", "-f", "-m", path)  # another uuid than its trees bear
    mount = [rng.choice(["compress-force=zstd", "compress=lzo", "nodatacow", "noatime"])]
    return path, [*mount, rng.choice(["discard=async", "nodiscard"])]


@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_filled_and_emptied(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    image, options = random_image(tmp_path / "disk", rng)
    with mounted(image, *options) as point:
        lived_in(point, rng)
        kept = checksums(point)
    found = seen(image)
    assert (runs(found.free), found.left_whole) == (free_of_dump(image), "")
    fields = super_fields(image)
    assert (found.uuid, found.used) == (fields["fsid"], int(fields["bytes_used"]))
    assert (found.label, found.size) == (
        run("btrfs", "filesystem", "label", image).strip(),
        int(fields["dev_item.total_bytes"]),
    )
    zero_free(image, found, rng.choice([0, 0xA5]))
    checked(image)
    with mounted(image) as point:
        assert checksums(point) == kept
        scrubbed(point)


@pytest.mark.parametrize("tree", ["free-space-tree", "^free-space-tree"])
def test_scattered(tree: str, tmp_path: Path) -> None:
    """The free space tree then has bitmaps; the extent tree more than one level."""
    image = made(tmp_path / "disk", 300 * MiB, "-R", tree, "-n", "4096")
    with mounted(image) as point:
        scatter(point, 7000)
    found = seen(image)
    assert len(found.free) > 6000
    assert (runs(found.free), found.left_whole) == (free_of_dump(image), "")
    assert "level 2" in dumped(image, "extent").partition("\n\t")[0]
    assert ("FREE_SPACE_BITMAP" in dumped(image, "10")) == (tree == "free-space-tree")


def test_block_group_tree(tmp_path: Path) -> None:
    image = made(tmp_path / "disk", 400 * MiB, "-m", "single")
    with mounted(image) as point:
        run("sync", "-f", point)
    (offset,) = {at - address for address, _, at in copies(image)}
    add_block_group_tree(image, offset)
    assert (runs(seen(image).free), seen(image).left_whole) == (free_of_dump(image), "")
    with mounted(image) as point:
        scatter(point, 500)
        run("fallocate", "-l", "200M", point / "file")  # of more block groups
        kept = checksums(point)
    found = seen(image)
    assert (runs(found.free), found.left_whole) == (free_of_dump(image), "")
    assert "BLOCK_GROUP_ITEM" not in dumped(image, "extent")
    zero_free(image, found, 0xA5)
    checked(image)
    with mounted(image) as point:
        assert checksums(point) == kept
        scrubbed(point)


def test_many_block_groups(tmp_path: Path) -> None:
    """On a disk with all three superblocks, in few round trips, and reading little."""
    image = made(tmp_path / "disk", 300 * GiB)
    with mounted(image) as point:
        for number in range(30):
            run("fallocate", "-l", "1G", point / f"{number}")
        (point / "file").write_bytes(os.urandom(MiB))
    files = Files(image)
    found = files.run(look(0, size_of(image)))
    assert (runs(found.free), found.left_whole) == (free_of_dump(image), "")
    assert files.reads < 12
    assert files.bytes_read < MiB


def test_smaller_than_its_partition(tmp_path: Path) -> None:
    """What is behind it is none of it."""
    image = made(tmp_path / "disk", 400 * MiB)
    with mounted(image) as point:
        run("btrfs", "filesystem", "resize", "300m", point)
    found = seen(image)
    assert (found.size, found.free[-1], found.left_whole) == (300 * MiB, 300 * MiB, "")
    assert runs(found.free) == free_of_dump(image)


def test_in_a_partition(tmp_path: Path) -> None:
    """All that is read is of it, and what is free counts from its start."""
    image = made(tmp_path / "disk", 120 * MiB)
    shifted = tmp_path / "shifted"
    run("dd", f"if={image}", f"of={shifted}", "bs=1M", "seek=3", "conv=sparse", "status=none")
    found = Files(shifted).run(look(3 * MiB, 120 * MiB))
    assert found == seen(image)
    assert not found.left_whole


@pytest.mark.parametrize("free_space_tree", [True, False])
def test_crashed_without_a_log(free_space_tree: bool, tmp_path: Path) -> None:
    """What was not yet committed is not there for the kernel either."""
    tree = "free-space-tree" if free_space_tree else "^free-space-tree"
    image = made(tmp_path / "disk", 300 * MiB, "-R", tree)
    crashed = tmp_path / "crashed"
    with mounted(image, "commit=300") as point:
        (point / "kept").write_bytes(os.urandom(MiB))
        (point / "old").write_bytes(os.urandom(3 * MiB))
        run("sync", "-f", point)
        (point / "old").unlink()
        (point / "new").write_bytes(os.urandom(5 * MiB))
        before = super_fields(image)["generation"]
        run("cp", "--sparse=always", image, crashed)
        # Any sync on this machine commits; not during the copy, or else it is one of no moment.
        assert super_fields(image)["generation"] == before
    shutil.copy(crashed, image)
    with mounted(image) as point:
        kept = checksums(point)
    assert "kept" in kept
    found = seen(crashed)
    assert (runs(found.free), found.left_whole) == (free_of_dump(crashed), "")
    zero_free(crashed, found, 0xA5)
    checked(crashed)
    with mounted(crashed) as point:
        assert checksums(point) == kept


def test_crashed_with_a_log(tmp_path: Path) -> None:
    image = made(tmp_path / "disk", 300 * MiB)
    with mounted(image, "commit=300") as point:
        (point / "old").write_bytes(os.urandom(MiB))
        run("sync", "-f", point)
        (point / "synced").write_bytes(os.urandom(MiB))
        run("sync", point / "synced")
        run("cp", "--sparse=always", image, tmp_path / "crashed")
    assert "log_root is" in seen(tmp_path / "crashed").left_whole
    assert seen(image).left_whole == ""


def test_paused_balance(tmp_path: Path) -> None:
    image = made(tmp_path / "disk", 500 * MiB, "-n", "4096")
    with mounted(image) as point:
        scatter(point, 3000)
        for number in range(9):
            (point / f"{number}").write_bytes(os.urandom(32 * MiB))
        run("sync", "-f", point)
        with subprocess.Popen(
            ["btrfs", "balance", "start", "--full-balance", str(point)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as balance:
            while "is running" not in run("btrfs", "balance", "status", point, codes=(0, 1)):
                assert balance.poll() is None, "it was over too soon"
            run("btrfs", "balance", "pause", point)
            balance.wait(60)
    assert "balance" in seen(image).left_whole
    with mounted(image, "skip_balance") as point:
        run("btrfs", "balance", "cancel", point)
    found = seen(image)
    assert (runs(found.free), found.left_whole) == (free_of_dump(image), "")
