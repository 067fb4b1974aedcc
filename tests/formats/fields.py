"""Every field of every header and table of an image, changed one at a time, beside qemu-img.

Where qemu-img converts what has been changed, imgfs gives the same bytes, or those of the image
that was not changed (a VMDK has each table twice), or refuses; where it refuses, imgfs refuses or
gives those.  `python -m tests.formats.fields` tries all values of all fields.
"""

from __future__ import annotations

import argparse
import random
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from imgfs.errors import ImgfsError
from imgfs.formats import qcow2_tables, vdi_tables, vhd_tables, vhdx_tables, vmdk_tables
from imgfs.views.opening import READERS
from tests.drive import Files
from tests.formats import vmdk_images
from tests.formats.fuzz_corpus import GUEST, Subject, subjects

BASE = b"below" * 1000  # as the corpus has it
TABLE_ENTRIES = 24  # of a table, from its start, that are changed
LARGEST = 64 << 20  # of a disk that is compared


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    offset: int
    width: int  #: bytes
    order: str  #: `<` or `>`
    is_entry: bool = False  #: of a table: other entries' values are tried too


def _struct(name: str, code: struct.Struct, names: Sequence[str], base: int) -> Iterator[Field]:
    """The fields of a structure at `base`; only numbers, of those that are text the first bytes."""
    order = code.format[0]
    at = base
    left = list(names)
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", code.format):
        if kind == "x":
            at += int(count or 1)
            continue
        size = struct.calcsize(order + kind)
        if kind == "s":
            yield Field(f"{name}.{left.pop(0)}", at, min(int(count or 1), 8), order)
            at += int(count or 1)
            continue
        for _ in range(int(count or 1)):
            yield Field(f"{name}.{left.pop(0)}", at, size, order)
            at += size


def _table(name: str, base: int, count: int, width: int, order: str) -> Iterator[Field]:
    for index in range(min(count, TABLE_ENTRIES)):
        yield Field(f"{name}[{index}]", base + index * width, width, order, True)


def _number(content: bytes, field: Field) -> int:
    part = content[field.offset : field.offset + field.width]
    return int.from_bytes(part, "little" if field.order == "<" else "big")


def _qcow2(content: bytes) -> Iterator[Field]:
    t = qcow2_tables
    header = t.HeaderV2(*t.HEADER_V2.unpack_from(content))
    yield from _struct("header", t.HEADER_V2, t.HeaderV2._fields, 0)
    if header.version == 3:
        yield from _struct("header", t.HEADER_V3, t.HeaderV3._fields, t.HEADER_V2_LENGTH)
        yield from _table("extensions", 104, 12, 8, ">")
    yield from _table("refcounts", header.refcount_table_offset, 2, 8, ">")
    at = header.snapshots_offset
    for number in range(header.nb_snapshots):
        entry = t.SnapshotEntry(*t.SNAPSHOT.unpack_from(content, at))
        yield from _struct(f"snapshot {number}", t.SNAPSHOT, t.SnapshotEntry._fields, at)
        at += t.SNAPSHOT.size + entry.extra_data_size + entry.id_str_size + entry.name_size
        at += -at % 8
    l1 = list(_table("L1", header.l1_table_offset, header.l1_size, 8, ">"))
    yield from l1
    for field in l1[:2]:
        l2 = _number(content, field) & t.ENTRY_OFFSET
        if l2:
            yield from _table(f"{field.name} L2", l2, 512, 8, ">")


def _vdi(content: bytes) -> Iterator[Field]:
    t = vdi_tables
    header = t.Header(*t.HEADER.unpack_from(content))
    yield from _struct("header", t.HEADER, t.Header._fields, 0)
    yield from _table("map", header.offBlocks, header.cBlocks, 4, "<")


def _vhd(content: bytes) -> Iterator[Field]:
    t = vhd_tables
    footer = t.footer(content[-512:])
    assert footer is not None
    yield from _struct("footer", t._FOOTER, t.Footer._fields, len(content) - 512)
    if footer.disk_type != t.FIXED:
        header, _ = t.header(content[footer.data_offset :][: t.HEADER_SIZE])
        yield from _struct("copy", t._FOOTER, t.Footer._fields, 0)
        yield from _struct("header", t._HEADER, t.Header._fields, footer.data_offset)
        yield from _table("blocks", header.table_offset, header.max_table_entries, 4, ">")


def _vhdx(content: bytes) -> Iterator[Field]:
    t = vhdx_tables
    for number, at in enumerate(t.HEADER_OFFSETS):
        yield from _struct(f"header {number}", t._HEADER, t.Header._fields, at)
    for number, at in enumerate(t.REGION_TABLE_OFFSETS):
        names = ("signature", "checksum", "count", "reserved")
        yield from _struct(f"regions {number}", t._TABLE_HEADER, names, at)
        for index in range(2):
            place = at + 16 + index * t._REGION_ENTRY.size
            name = f"region {number}.{index}"
            yield from _struct(name, t._REGION_ENTRY, t.Region._fields, place)
    regions = t.regions(content[t.REGION_TABLE_OFFSETS[0] :][: t.REGION_TABLE_SIZE]) or []
    for region in regions:
        at = region.file_offset
        if region.guid == t.BAT_REGION:
            yield from _table("BAT", at, 64, 8, "<")
            continue
        yield from _struct("metadata", t._METADATA_HEADER, ("signature", "count"), at)
        items = t.items(content[at : at + t.METADATA_TABLE_SIZE]) or []
        for index, item in enumerate(items):
            place = at + 32 + index * t._METADATA_ENTRY.size
            yield from _struct(f"item {index}", t._METADATA_ENTRY, t.Item._fields, place)
            for part in range(0, min(item.length, 32), 4):
                yield Field(f"item {index}+{part}", at + item.offset + part, 4, "<")


def _vmdk(content: bytes) -> Iterator[Field]:
    t = vmdk_tables
    if content[:4] == t.COWD_MAGIC:
        cowd = t.CowdHeader(*t.COWD_HEADER.unpack_from(content))
        yield from _struct("header", t.COWD_HEADER, t.CowdHeader._fields, 0)
        yield from _tables_of(content, cowd.gdOffset * 512, 2, 4)
        return
    if content[:4] == t.SESPARSE_MAGIC.to_bytes(4, "little"):
        names = t.SeSparseHeader._fields
        header = t.SeSparseHeader(*t.SESPARSE_HEADER.unpack_from(content))
        yield from _struct("header", t.SESPARSE_HEADER, names, 0)
        volatile = ("magic", "free_gt_number", "next_txn_seq_number", "replay_journal")
        at = header.volatile_header_offset * 512
        yield from _struct("volatile", t.SESPARSE_VOLATILE_HEADER, volatile, at)
        yield from _table("directory", header.grain_dir_offset * 512, 2, 8, "<")
        yield from _table("table", header.grain_tables_offset * 512, 24, 8, "<")
        return
    if content[:4] != t.SPARSE_MAGIC:
        return
    names = t.SparseExtentHeader._fields
    hosted = t.SparseExtentHeader(*t.SPARSE_HEADER.unpack_from(content))
    yield from _struct("header", t.SPARSE_HEADER, names, 0)
    if hosted.gdOffset == t.GD_AT_END:
        at = len(content) - 1024
        hosted = t.SparseExtentHeader(*t.SPARSE_HEADER.unpack_from(content, at))
        yield from _struct("footer", t.SPARSE_HEADER, names, at)
        for number, place in enumerate((at - 512, at + 512)):
            marker = ("val", "size", "type")
            yield from _struct(f"marker {number}", t.MARKER, marker, place)
    for at in {hosted.gdOffset, hosted.rgdOffset} - {0}:
        yield from _tables_of(content, at * 512, 3, 4)


def _tables_of(content: bytes, at: int, count: int, width: int) -> Iterator[Field]:
    directory = list(_table(f"directory at {at}", at, count, width, "<"))
    yield from directory
    for field in directory:
        table = _number(content, field) * 512
        if 0 < table < len(content):
            yield from _table(f"table at {table}", table, 512, width, "<")


_FIELDS: dict[str, Callable[[bytes], Iterator[Field]]] = {
    "qcow2": _qcow2,
    "vdi": _vdi,
    "vpc": _vhd,
    "vhdx": _vhdx,
    "vmdk": _vmdk,
}


def fields_of(subject: Subject) -> list[Field]:
    found = {(each.offset, each.width): each for each in _FIELDS[subject.format](subject.content)}
    return [each for each in found.values() if each.offset + each.width <= len(subject.content)]


def values_of(subject: Subject, field: Field, fields: Sequence[Field]) -> list[int]:
    """What is tried instead of what is there: small changes, places of other things, limits."""
    old, size = _number(subject.content, field), len(subject.content)
    bits = 8 * field.width
    flags = old & ~((1 << (bits - 8)) - 1) if field.width == 8 else 0
    found = [0, 1, 2, 6, 7, old + 1, old - 1, old * 2, old // 2, (1 << bits) - 1, (1 << bits) - 2]
    found += [old + each for each in (8, 256, 512, 4096, 65536, 1 << 20)]
    found += [old - each for each in (256, 512, 4096, 65536, 1 << 20)]
    found += [
        1 << (bits - 1),
        old ^ (1 << (bits - 1)),
        size,
        size - 512,
        size // 512,
        size // 512 - 1,
    ]
    found += [each | flags for each in (512, 4096, 65536, size & ~511)]
    if field.is_entry:
        others = [each for each in fields if each.is_entry and each.width == field.width]
        values = list(dict.fromkeys(_number(subject.content, each) for each in others))
        found += values[:12]
        found += [(values[index] & ~7) | (old & 7) for index in range(min(6, len(values)))]
        found += [each.offset // 512 for each in fields[:40:8]]
        found += [each.offset & ~511 | flags for each in fields[:40:8]]
    limit = 1 << bits
    return [each for each in dict.fromkeys(value % limit for value in found) if each != old]


def changed(subject: Subject, field: Field, value: int) -> bytes:
    found = bytearray(subject.content)
    order = "little" if field.order == "<" else "big"
    found[field.offset : field.offset + field.width] = value.to_bytes(field.width, order)  # type: ignore[arg-type]
    subject.repair(found)
    return bytes(found)


def ours(subject: Subject, content: bytes) -> bytes | None:
    """What imgfs says that the disk holds; None where it refuses some of it."""
    first = subject.head or content
    files = Files(first, {"x": content})
    try:
        disk = files.run(import_module(READERS[subject.format]).open_disk("x.img", len(first)))
        if disk.size > LARGEST or (disk.backing is None) != (not _has_base(subject)):
            return None
        if disk.backing is not None and not disk.backing.name.endswith("/base"):
            return None
        return files.read(disk, 0, disk.size, lambda at, n: BASE[at : at + n].ljust(n, b"\0"))
    except (ImgfsError, KeyError):
        return None


def _has_base(subject: Subject) -> bool:
    return subject.name == "qcow2-snapshots"


def qemus(subject: Subject, content: bytes, folder: Path) -> bytes | None:
    """What qemu-img says that it holds; None where it refuses that."""
    image = folder / "image"
    out = folder / "out"
    image.write_bytes(subject.head or content)
    (folder / "x").write_bytes(content)
    out.unlink(missing_ok=True)
    command = ["qemu-img", "convert", "-f", subject.format, "-O", "raw", image, out]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return out.read_bytes() if done.returncode == 0 else None


def check(subject: Subject, field: Field, value: int, good: bytes, folder: Path) -> tuple[str, str]:
    """How both took a change, and what is wrong with that, or nothing."""
    content = changed(subject, field, value)
    here = ours(subject, content)
    if here is None:
        return "refused", ""
    there = qemus(subject, content, folder)
    if there is None:
        name, wrong = "qemu-img refuses", here != good
    else:
        name, wrong = "both read", here not in (there, good)
    if not wrong:
        return name, ""
    what = f"{subject.name}: {field.name} at byte {field.offset}: {value:#x}"
    return name, f"{what} is read otherwise than {'before' if there is None else 'by qemu-img'}"


def cases(corpus: Sequence[Subject]) -> Iterator[tuple[Subject, Field, int]]:
    for subject in corpus:
        fields = fields_of(subject)
        for field in fields:
            for value in values_of(subject, field, fields):
                yield subject, field, value


def corpus(folder: Path) -> list[Subject]:
    """The subjects that qemu-img reads, and that have fields."""
    skipped = ("vhdx-differencing", "vhdx-log", "vmdk-descriptor")
    found = []
    for each in subjects(folder):
        if each.format == GUEST:
            break
        if each.name == "vmdk-sesparse":  # its own has an entry that cannot be
            content = bytes(vmdk_images.sesparse(64, {0: None, 5: None}))
            each = replace(each, content=content)
        if each.name not in skipped:
            found.append(each)
    return found


def run(
    corpus: Sequence[Subject], folder: Path, most: int | None, seed: int = 1
) -> tuple[Counter[str], list[str]]:
    """`most` of all cases, or all: how often what came of them, and what is wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    good = {each.name: ours(each, each.content) for each in corpus}
    chosen = list(cases(corpus))
    if most is not None:
        chosen = random.Random(seed).sample(chosen, min(most, len(chosen)))
    for subject, field, value in chosen:
        before = good[subject.name]
        assert before is not None, subject.name
        name, problem = check(subject, field, value, before, folder)
        counts[name] += 1
        wrong += [problem] if problem else []
    return counts, wrong


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, help="how many of them; all if not said")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="the subject with this name")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = [each for each in corpus(folder) if given.only in (None, each.name)]
        counts, wrong = run(made, folder, given.cases, given.seed)
    print("\n".join([*wrong, f"{sum(counts.values())} cases: {dict(counts)}, {len(wrong)} wrong"]))
    return len(wrong)


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
