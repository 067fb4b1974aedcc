"""Free space of ext2, ext3 and ext4 that mke2fs made and the kernel filled, against dumpe2fs."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from imgfs.guest.ext import look
from imgfs.guest.space import Filesystem
from tests.drive import Bytes, Files, size_of
from tests.guest.mounted import (
    LONG,
    checksums,
    fragment,
    free_of_domain,
    in_order,
    joined,
    mounted,
    run,
    runs,
    zero_free,
)

MiB = 1 << 20


def seen(image: Bytes, start: int = 0) -> Filesystem:
    found = Files(image).run(look(start, size_of(image) - start))
    in_order(found)
    return found


def options(rng: random.Random, mountable: bool = True) -> list[str]:
    """Some that mke2fs takes together; mountable: what kernels without quota and with small pages
    can mount."""
    kind = rng.choice(["ext2", "ext3", "ext4", "ext4", "ext4", "ext4"])
    block = cluster = rng.choice([1024, 2048, 4096, 4096, *([] if mountable else [8192, 65536])])
    words = ["-t", kind, "-b", str(block)]
    features: list[str] = []
    if rng.random() < 0.3:
        features += ["^resize_inode", "meta_bg"]
    elif rng.random() < 0.3:
        features.append("^resize_inode")
    if rng.random() < 0.3:
        features += ["sparse_super2"] if rng.random() < 0.5 else ["^sparse_super", "^resize_inode"]
    if rng.random() < 0.5:
        words += ["-g", str(rng.choice([1024, 2048, 8 * 520]))]
    if kind == "ext4":
        features.append(rng.choice(["64bit", "^64bit"]))
        features.append(rng.choice(["flex_bg", "^flex_bg"]))
        checks = ["metadata_csum", "metadata_csum,metadata_csum_seed"]
        features.append(rng.choice([*checks, "^metadata_csum,uninit_bg", "^metadata_csum"]))
        features += rng.choice([["^has_journal"], ["orphan_file"], ["fast_commit"], []])
        # e2fsprogs waits for ten seconds where there is mmp
        more = ["mmp"] if mountable else ["quota", "casefold"]
        features += rng.sample(["inline_data", "large_dir", *more], 2)
        if rng.random() < 0.3 and "-g" not in words:
            features.append("bigalloc")
            cluster = block * rng.choice([2, 16, 64])
            words += ["-C", str(cluster)]
        words += ["-G", str(rng.choice([2, 16, 64]))] if "flex_bg" in features else []
        packed = f",packed_meta_blocks={rng.randrange(2)}" if "flex_bg" in features else ""
        words += ["-E", f"lazy_itable_init={rng.randrange(2)}{packed}"]
    if rng.random() < 0.5:
        words += ["-I", str(rng.choice([256, 512] if kind == "ext4" else [128, 256]))]
    words += ["-i", str(max(cluster, rng.choice([4096, 16384, 65536]))), "-O", ",".join(features)]
    return [*words, "-L", "a name", "-F", "-q"]


def made(image: Path, size: int, *words: str) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    run("mke2fs", *words, image)
    return image


def free_of_dumpe2fs(image: Path) -> list[tuple[int, int]]:
    text = run("dumpe2fs", image)

    def number(name: str) -> int:
        return int(re.findall(rf"^{name}: +(\d+)", text, re.M)[0])

    # Of clusters it names the first block.
    block = number("Block size")
    last = number("Cluster size") if "bigalloc" in text else block
    bounds = re.findall(r"(\d+)(?:-(\d+))?", ",".join(re.findall(r"  Free blocks: (.*)", text)))
    return joined((int(a) * block, int(b or a) * block + last) for a, b in bounds)


def free_of_partclone(image: Path) -> list[tuple[int, int]]:
    log = image.with_suffix(".domain")
    run("partclone.extfs", "-D", "-q", "-s", image, "-o", log, "-L", "/dev/null")
    return free_of_domain(log.read_text())


@pytest.mark.parametrize("seed", range(100 if LONG else 9))
def test_filled_and_emptied(seed: int, tmp_path: Path) -> None:
    """dumpe2fs calls the same blocks free, and nothing but those was needed."""
    rng = random.Random(seed)
    size = rng.randrange(16 * MiB, 150 * MiB, 1024)
    words = options(rng)
    image = made(tmp_path / "disk", size, *words)
    before = seen(image)
    assert (runs(before.free), before.left_whole) == (free_of_dumpe2fs(image), "")
    assert before.free
    with mounted(image) as point:
        fragment(point, rng, size // 4)
        kept = checksums(point)
    after = seen(image)
    assert (runs(after.free), after.left_whole) == (free_of_dumpe2fs(image), "")
    assert (after.label, after.kind[:3]) == ("a name", "ext")
    if LONG and "bigalloc" not in str(words):  # which partclone refuses
        assert runs(after.free) == free_of_partclone(image)
    zero_free(image, after, byte=seed % 2 * 0xA5)
    run("e2fsck", "-fn", image)
    with mounted(image, "ro") as point:
        assert checksums(point) == kept


def resize(image: Path, size: int) -> None:
    """To that many bytes, or to as few as it can have."""
    block = int(re.findall(r"Block size: +(\d+)", run("dumpe2fs", "-h", image))[0])
    fewest = int(run("resize2fs", "-P", image).split()[-1])
    # It asks for force where there is bigalloc.
    run("resize2fs", "-f", image, max(size // block, fewest))


@pytest.mark.parametrize("seed", range(300 if LONG else 12))
def test_what_debugfs_wrote(seed: int, tmp_path: Path) -> None:
    """Also of blocks larger than pages, with quota; grown or made smaller afterwards."""
    rng = random.Random(1000 + seed)
    size = rng.randrange(24 * MiB, 150 * MiB, 65536)
    image = made(tmp_path / "disk", size, *options(rng, mountable=False))
    content = tmp_path / "content"
    content.write_bytes(rng.randbytes(MiB))
    steps = []
    for number in range(rng.randrange(20)):
        steps.append(f"write {content} {number}")
        steps += [f"rm {rng.randrange(number + 1)}"] if rng.random() < 0.4 else []
    run("debugfs", "-w", "-f", "-", image, text="\n".join(steps) + "\n")
    run("e2fsck", "-fy", image, codes=(0, 1))  # quota is not what debugfs writes
    if seed % 3:
        resize(image, size * 2 if seed % 3 == 1 else size * 9 // 10)
        run("e2fsck", "-fy", image, codes=(0, 1))
    found = seen(image)
    assert (runs(found.free), found.left_whole) == (free_of_dumpe2fs(image), "")
    zero_free(image, found)
    run("e2fsck", "-fn", image)
