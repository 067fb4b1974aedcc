"""What the fuzzer changes: small images as real tools write them, and a few made by hand.

Nothing is kept in the repository: all of them are made anew, in a few seconds.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import google_crc32c

from imgfs.guest import ext_tables
from tests.formats import qemu, vhdx_files, vmdk_images
from tests.guest.lvm2 import crc, physical
from tests.guest.tools import MIB, empty, put_file, run

GUEST = "guest"
Repair = Callable[[bytearray], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A file to be changed; `format` is what qemu calls it, or GUEST for a guest's disk.

    `size` is what it is said to have: behind the bytes that are here it is all zeroes.
    """

    name: str
    format: str
    content: bytes = field(repr=False)
    size: int = 0
    #: what names the file "x", when that is what is to be changed
    head: bytes = field(default=b"", repr=False)
    repair: Repair = lambda changed: None  #: makes checksums right again
    #: of a large disk, which of its parts the content is, one behind the other; the rest is zeroes
    parts: tuple[int, ...] = ()
    places: tuple[int, ...] = ()  #: of sectors that are not zero


def _nothing(changed: bytearray) -> None:
    pass


def subjects(folder: Path) -> Iterator[Subject]:
    """All of them, made one by one; files are made in `folder`."""
    for found in chain(_by_qemu(folder), _by_hand(), _guests(folder)):
        used = range(0, len(found.content), 512)
        places = tuple(at for at in used if any(found.content[at : at + 512]))
        size = found.size or len(found.content)
        yield replace(found, size=size, places=places)


_QEMU = {
    "qcow2": ("qcow2", "cluster_size=4k"),
    "qcow2-v2": ("qcow2", "compat=0.10,cluster_size=512"),
    "qcow2-extended": ("qcow2", "extended_l2=on,cluster_size=16k"),
    "qcow2-large": ("qcow2", "cluster_size=2M"),
    "vmdk": ("vmdk", ""),
    "vmdk-stream": ("vmdk", "subformat=streamOptimized"),
    "vdi": ("vdi", ""),
    "vhd": ("vpc", "force_size=on"),
    "vhd-fixed": ("vpc", "subformat=fixed,force_size=on"),
    "vhdx": ("vhdx", "block_size=1M"),
}


def _by_qemu(folder: Path) -> Iterator[Subject]:
    writes = ("write -P 1 0 12k", "write -P 2 300k 5k", "write -P 3 3M 1k")
    for name, (format, options) in _QEMU.items():
        path = folder / name
        more = ["-o", options] if options else []
        if "stream" in options:  # qemu-io cannot write into it
            raw = empty(folder / "raw", 4 * MIB)
            qemu.io(raw, "raw", *writes)
            qemu.img("convert", "-f", "raw", "-O", format, *more, raw, path)
        else:
            qemu.img("create", "-q", "-f", format, *more, path, "4M")
            qemu.io(path, format, *writes)
        repair = {"vpc": _repair_vhd, "vhdx": vhdx_files.repair}.get(format, _nothing)
        yield Subject(name, format, path.read_bytes(), repair=repair)
    path = folder / "snapshots"
    options = "cluster_size=1k,backing_fmt=raw"
    (folder / "base").write_bytes(b"below" * 1000)
    base = str(folder / "base")
    qemu.img("create", "-q", "-f", "qcow2", "-o", options, "-b", base, path, "1M")
    for number in range(3):
        qemu.io(path, "qcow2", f"write -P {number + 1} {number * 7}k 9k", "write -z 40k 9k")
        qemu.img("snapshot", "-c", f"snap{number}", path)
    yield Subject("qcow2-snapshots", "qcow2", path.read_bytes())
    for codec in ("zlib", "zstd"):
        raw, path = empty(folder / "raw", 2 * MIB), folder / codec
        raw.write_bytes(b"abcdefgh" * (MIB // 8))
        options = f"compression_type={codec},cluster_size=4k"
        qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        yield Subject(f"qcow2-{codec}", "qcow2", path.read_bytes())


def _by_hand() -> Iterator[Subject]:
    made = vhdx_files.Differencing(64 * MIB, MIB)
    for block in (0, 7, 8, 63):
        made.add(block, bytes(4096) + b"x", {1, 5} if block % 2 else None)
    file = made.file()
    yield Subject("vhdx-differencing", "vhdx", bytes(file), repair=vhdx_files.repair)
    entry = vhdx_files.log_entry(5, 0, [(3 * MIB, b"y" * 4096), (4 * MIB, 8192)], len(file))
    vhdx_files.set_log(file, entry)
    yield Subject("vhdx-log", "vhdx", bytes(file), repair=vhdx_files.repair)
    grains = {0: None, 5: None, 130: None}
    hosted = vmdk_images.hosted(9000, grains)
    yield Subject("vmdk-hosted", "vmdk", bytes(hosted))
    stream = vmdk_images.stream(9000, {0: bytes(4096), 5: b"x" * 4096, 900: b"y" * 4096})
    yield Subject("vmdk-footer", "vmdk", bytes(stream))
    extents = {
        "cowd": ("vmfsSparse", 'RW 9000 VMFSSPARSE "x"', vmdk_images.cowd(9000, [2, 5000])),
        "sesparse": ("seSparse", 'RW 64 SESPARSE "x"', vmdk_images.sesparse(64, {0: None, 5: 1})),
    }
    for name, (kind, extent, content) in extents.items():
        text = vmdk_images.text(kind, extent)
        yield Subject(f"vmdk-{name}", "vmdk", bytes(content), head=text)
    flat = vmdk_images.text("twoGbMaxExtentFlat", 'RW 6 FLAT "y" 0', 'RW 5 FLAT "z" 2')
    yield Subject("vmdk-descriptor", "vmdk", flat)


def _repair_vhd(changed: bytearray) -> None:
    for at, size, checksum_at in ((0, 512, 64), (512, 1024, 36), (len(changed) - 512, 512, 64)):
        part = changed[at : at + size] if at >= 0 else b""
        if len(part) == size:
            checksum = ~(sum(part) - sum(part[checksum_at : checksum_at + 4])) & 0xFFFFFFFF
            struct.pack_into(">I", changed, at + checksum_at, checksum)


_FILESYSTEMS = {
    "ext4": (8, "mkfs.ext4 -q -F -b 1024"),
    "ext2": (8, "mkfs.ext2 -q -F"),
    "xfs": (320, "mkfs.xfs -q"),
    "xfs-v4": (320, "mkfs.xfs -q -m crc=0"),
    "ntfs": (8, "mkntfs --force --fast --quiet"),
    "fat12": (4, "mkfs.fat -F 12"),
    "fat32": (40, "mkfs.fat -F 32 -s 1"),
    "exfat": (8, "mkfs.exfat"),
    "swap": (4, "mkswap -q"),
    "btrfs": (120, "mkfs.btrfs -q -m single"),
}
PART = 16 << 10  # bytes; a node of btrfs
_LARGE = 32 * MIB  # of such a disk only the parts that are not zero are kept


def _guests(folder: Path) -> Iterator[Subject]:
    for name, (size_mib, command) in _FILESYSTEMS.items():
        path = empty(folder / name, size_mib * MIB)
        run(*command.split(), path)
        repairs = {"ext4": _repair_ext, "ext2": _repair_ext, "btrfs": _repair_btrfs}
        repair = repairs.get(name, _nothing)
        yield _guest(name, path, repair)
    disk = empty(folder / "gpt", 16 * MIB)
    run("sfdisk", "--quiet", disk, stdin="label: gpt\nsize=8M\nsize=2M, type=swap\nsize=2M\n")
    put_file(disk, MIB, folder / "ext4")
    yield _guest("gpt", disk, _repair_gpt)
    disk = empty(folder / "mbr", 24 * MIB)
    run("sfdisk", "--quiet", disk, stdin="size=4M\nsize=9M, type=5\n" + 4 * "size=2M\n")
    put_file(disk, MIB, folder / "fat12")
    yield _guest("mbr", disk, _nothing)
    pv = empty(folder / "lvm", 16 * MIB)
    with physical([pv], folder / "lock") as lvm:
        lvm("pvcreate", *lvm.devices)
        lvm("vgcreate -s 1m vg", *lvm.devices)
        lvm.create("-l 5 -n one vg")
        lvm.create("-l 3 -n two vg")
    put_file(pv, MIB, folder / "swap")
    yield _guest("lvm", pv, _repair_lvm)


def _guest(name: str, path: Path, repair: Repair) -> Subject:
    size = path.stat().st_size
    if size < _LARGE:
        return Subject(name, GUEST, path.read_bytes(), size, repair=repair)
    content, parts = b"", []
    with path.open("rb") as file:
        for at in range(0, size, PART):
            if any(part := file.read(PART)):
                content += part.ljust(PART, b"\0")
                parts.append(at)
    return Subject(name, GUEST, content, size, repair=repair, parts=tuple(parts))


def _repair_btrfs(changed: bytearray) -> None:
    """Of the superblock, and of all that may be a node."""
    for at in range(0, len(changed), PART):
        is_super = changed[at + 64 : at + 72] == b"_BHRfS_M"
        end = at + (4096 if is_super else PART)
        checksum = google_crc32c.value(bytes(changed[at + 32 : end]))
        struct.pack_into("<I", changed, at, checksum)


def _repair_ext(changed: bytearray) -> None:
    checksum = ext_tables.crc32c(0xFFFFFFFF, bytes(changed[1024 : 1024 + 0x3FC]))
    changed[1024 + 0x3FC : 2048] = struct.pack("<I", checksum)


def _repair_gpt(changed: bytearray) -> None:
    for at in (512, len(changed) - 512):
        (entries_at,) = struct.unpack_from("<Q", changed, at + 72)
        count, size = struct.unpack_from("<II", changed, at + 80)
        if count * size <= MIB:
            entries = changed[entries_at * 512 : entries_at * 512 + count * size]
            struct.pack_into("<I", changed, at + 88, zlib.crc32(entries))
        changed[at + 16 : at + 20] = bytes(4)
        struct.pack_into("<I", changed, at + 16, zlib.crc32(changed[at : at + 92]))


def _repair_lvm(changed: bytearray) -> None:
    at, length = struct.unpack_from("<QQ", changed, 4096 + 40)
    if length < 8192:
        text = bytes(changed[4096 + at : 4096 + at + length])
        struct.pack_into("<I", changed, 4096 + 56, crc(text))
    struct.pack_into("<I", changed, 4096, crc(bytes(changed[4100:4608])))
