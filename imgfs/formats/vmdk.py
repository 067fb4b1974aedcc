"""VMDK, VMware's disks: one file, or a descriptor and the extents that it lists.

VMware, "Virtual Disk Format 5.0".  Opening reads headers and, where they are small, grain
directories; mapping reads grain tables.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vmdk_tables as t
from imgfs.formats.disk import Backing, Disk
from imgfs.formats.vmdk_descriptor import (
    FLAT_TYPES,
    LONGEST,
    NO_PARENT,
    Descriptor,
    ExtentLine,
    parse,
)
from imgfs.formats.vmdk_headers import (
    ExtentFile,
    cowd_extent,
    hosted_extent,
    hosted_header,
    sesparse_extent,
    tail_of,
    volatile_header_of,
)
from imgfs.formats.vmdk_sparse import Grains, SparseExtent
from imgfs.formats.window import Window
from imgfs.pieces import Kind, PieceList
from imgfs.steps import Opened, Read, Steps, open_file, read_all, together

SECTOR = t.SECTOR
HEAD = 64 << 10  # bytes read first: header, descriptor and, of most, the grain directory
KEPT = 4 << 20  # bytes of all grain directories; larger ones are read when they are needed
MAP = 1 << 20  # bytes of grain tables that one map reads
WHOLE = {"monolithicSparse", "streamOptimized"}  # their one extent is the file itself


@dataclass(frozen=True, slots=True)
class FlatExtent:
    """Bytes of a file as they are."""

    where: str  #: begins messages
    file: int
    file_size: int  #: bytes
    offset: int  #: bytes
    size: int  #: bytes

    def append(self, window: Window, start: int) -> bool:
        """As `SparseExtent.append`."""
        stored = min(self.size, max(0, self.file_size - self.offset))
        if stored:
            window.builder.data(start + stored, self.offset, self.file)
        if stored == self.size:
            return False
        # A file may end within its last sector.
        if stored % SECTOR and self.size - stored < SECTOR:
            window.builder.zero(start + self.size)
            return False
        problem = (
            f"{self.where}: the file ends at {self.file_size}, before "
            f"{self.offset + self.size}, which the descriptor says"
        )
        return window.bad(start + self.size, problem)


@dataclass(frozen=True, slots=True)
class ZeroExtent:
    size: int  #: bytes

    def append(self, window: Window, start: int) -> bool:
        """As `SparseExtent.append`."""
        window.builder.zero(start + self.size)
        return False


Extent = SparseExtent | FlatExtent | ZeroExtent


class VmdkDisk(Disk):
    format: ClassVar[str] = "vmdk"

    def __init__(self, descriptor: Descriptor, extents: Sequence[Extent]) -> None:
        """`extents` are none of them empty."""
        self.own_id = f"{descriptor.cid:08x}"
        if descriptor.parent_cid != NO_PARENT:
            self.backing = Backing(
                descriptor.parent_name, "vmdk", (f"{descriptor.parent_cid:08x}",)
            )
        self._descriptor = descriptor
        self._extents = extents
        self._is_checked = False
        self._starts = [0]
        for extent in extents:
            self._starts.append(self._starts[-1] + extent.size)
        self.size = self._starts.pop()

    def _check(self) -> Steps[None]:
        """Of what is small all of it is looked at before anything is read by it."""
        if not self._is_checked:
            sparse = [each for each in self._extents if isinstance(each, SparseExtent)]
            checked = iter((yield from together([each.checked() for each in sparse])))
            self._extents = [
                next(checked) if isinstance(each, SparseExtent) else each for each in self._extents
            ]
            self._is_checked = True

    def map(self, offset: int, length: int) -> Steps[PieceList]:
        yield from self._check()
        end = min(offset + length, self.size)
        first = bisect_right(self._starts, offset) - 1
        reading: dict[int, Steps[list[Grains]]] = {}
        start, budget, index = self._starts[first], MAP, first
        while index < len(self._extents) and self._starts[index] < end and budget > 0:
            extent, at = self._extents[index], self._starts[index]
            index += 1
            if not isinstance(extent, SparseExtent):
                continue
            table = max(0, offset - at) // extent.span
            room = max(1, budget // extent.table_cost)
            stop = min(-(-min(end - at, extent.size) // extent.span), table + room)
            if index == first + 1:
                start += table * extent.span
            reading[index - 1] = extent.read_grains(table, stop)
            budget -= (stop - table) * extent.table_cost
            if stop < extent.tables:
                break
        grains = yield from together(list(reading.values()))
        known = dict(zip(reading, grains, strict=True))
        return self._pieces(Window(start, offset), range(first, index), known)

    def _pieces(self, window: Window, indexes: range, grains: dict[int, list[Grains]]) -> PieceList:
        """Of these extents, as much as is known of them."""
        for index in indexes:
            extent, start = self._extents[index], self._starts[index]
            if isinstance(extent, SparseExtent):
                stop = extent.append(window, start, grains[index])
            else:
                stop = extent.append(window, start)
            if stop:
                break
        return window.builder.finish(window.builder.end)

    def facts(self) -> list[tuple[str, str]]:
        found = [("createType", self._descriptor.create_type), ("CID", str(self.own_id))]
        if self.backing:
            found += [("parentCID", " ".join(self.backing.wanted_ids or ()))]
            found += [("parentFileNameHint", self.backing.name)]
        found += [("extents", str(len(self._extents)))]
        sizes = sorted({e.grain for e in self._extents if isinstance(e, SparseExtent)})
        return found + [("grainSize", str(size)) for size in sizes]


def open_disk(name: str, size: int) -> Steps[VmdkDisk]:
    """`size` is of file 0, in bytes; `name` is its name, for messages.

    Asks for the files that a descriptor lists, by the names that it has for them.  Raises
    CorruptImage and UnsupportedFeature.
    """
    tail = tail_of(size)
    reads = [Read(0, min(HEAD, size))] if size else []
    found = yield from read_all([*reads, tail] if tail else reads)
    of = ExtentFile(name, 0, size, found[0] if found else b"", found[1] if tail else b"")
    if of.magic == t.SPARSE_MAGIC:
        return (yield from _open_sparse(of))
    if of.magic in (t.COWD_MAGIC, t.SESPARSE_MAGIC.to_bytes(4, "little")):
        raise UnsupportedFeature(
            f"{name}: is a part of a disk; open the .vmdk whose descriptor lists it"
        )
    if size > LONGEST:
        raise CorruptImage(
            f"{name}: no magic number of a vmdk, and too large for a descriptor ({size} bytes)"
        )
    text = of.head + (yield from _read_rest(of, size))
    return (yield from _open_listed(name, parse(name, text)))


def _read_rest(of: ExtentFile, end: int) -> Steps[bytes]:
    """What follows the head, up to `end`."""
    if end <= len(of.head):
        return b""
    (rest,) = yield from read_all([Read(len(of.head), end - len(of.head), of.number)])
    return rest


def _open_sparse(of: ExtentFile) -> Steps[VmdkDisk]:
    header = hosted_header(of)
    offset, length = header.descriptorOffset * SECTOR, header.descriptorSize * SECTOR
    if not offset or not length:
        raise UnsupportedFeature(
            f"{of.where}: has no descriptor (descriptorOffset {header.descriptorOffset} at offset "
            "28): a part of a disk; open the .vmdk that lists it"
        )
    if length > LONGEST or offset + length > of.size:
        raise CorruptImage(
            f"{of.where}: descriptorOffset {header.descriptorOffset} (offset 28), descriptorSize "
            f"{header.descriptorSize} (offset 36): {length} bytes at {offset} are not in the file "
            f"({of.size} bytes) or more than {LONGEST}"
        )
    if offset + length <= len(of.head):
        text = of.head[offset : offset + length]
    else:
        (text,) = yield from read_all([Read(offset, length)])
    descriptor = parse(of.where, text)
    if header.capacity == 0 and descriptor.create_type not in WHOLE:
        return (yield from _open_listed(of.where, descriptor))
    extents = [hosted_extent(of, None, _absent(descriptor))] if header.capacity else []
    return VmdkDisk(descriptor, (yield from _keep_directories(extents, of.head)))


def _absent(descriptor: Descriptor) -> Kind:
    return Kind.ZERO if descriptor.parent_cid == NO_PARENT else Kind.BELOW


def _open_listed(name: str, descriptor: Descriptor) -> Steps[VmdkDisk]:
    lines = [line for line in descriptor.extents if line.sectors]
    if not lines:
        raise CorruptImage(f"{name}: descriptor: lists no extents")
    if sum(line.sectors for line in lines) * SECTOR >= 1 << 63:
        raise CorruptImage(f"{name}: descriptor: its extents are absurdly large")
    opened: dict[str, Opened] = {}
    for line in lines:
        if line.name and line.name not in opened:
            opened[line.name] = yield from open_file(line.name)
    files = yield from _read_headers(name, lines, opened)
    volatile = yield from _read_volatile_headers(lines, files)
    absent = _absent(descriptor)
    extents: list[Extent] = []
    for line in lines:
        if line.type == "ZERO":
            extents.append(ZeroExtent(line.sectors * SECTOR))
        elif line.type in FLAT_TYPES:
            file, size = opened[line.name]
            where = f"{name}: extent {line.name!r}"
            offset = line.offset_sectors * SECTOR
            extents.append(FlatExtent(where, file, size, offset, line.sectors * SECTOR))
        else:
            of = files[line.name]
            extents.append(_listed_extent(line, of, volatile.get(line.name, b""), absent))
    return VmdkDisk(descriptor, (yield from _keep_directories(extents, b"")))


def _read_headers(
    name: str, lines: list[ExtentLine], opened: dict[str, Opened]
) -> Steps[dict[str, ExtentFile]]:
    """Of the sparse ones."""
    names = dict.fromkeys(x.name for x in lines if x.name and x.type not in FLAT_TYPES)
    reads: list[Read] = []
    for file, size in (opened[x] for x in names):
        reads += [Read(0, SECTOR, file)]
        reads += [tail for tail in [tail_of(size, file)] if tail]
    found = iter((yield from read_all(reads)))
    files = {}
    for x in names:
        file, size = opened[x]
        head = next(found)
        tail = next(found) if tail_of(size, file) else b""
        files[x] = ExtentFile(f"{name}: extent {x!r}", file, size, head, tail)
    return files


def _read_volatile_headers(
    lines: list[ExtentLine], files: dict[str, ExtentFile]
) -> Steps[dict[str, bytes]]:
    names = list(dict.fromkeys(line.name for line in lines if line.type == "SESPARSE"))
    found = yield from read_all([volatile_header_of(files[x]) for x in names])
    return dict(zip(names, found, strict=True))


def _listed_extent(line: ExtentLine, of: ExtentFile, volatile: bytes, absent: Kind) -> SparseExtent:
    if line.type == "SESPARSE":
        return sesparse_extent(of, volatile, line.sectors, absent)
    if of.magic == t.COWD_MAGIC:
        return cowd_extent(of, line.sectors, absent)
    if of.magic == t.SPARSE_MAGIC:
        return hosted_extent(of, line.sectors, absent)
    raise CorruptImage(f"{of.where}: magic {of.magic!r} (offset 0) is not of a sparse extent")


def _keep_directories(extents: Sequence[Extent], head: bytes) -> Steps[list[Extent]]:
    """The extents with their directories, if these are small; `head` is how file 0 begins."""
    sparse = [e for e in extents if isinstance(e, SparseExtent)]
    reads = [e.read_directory() for e in sparse]
    if sum(x.length for x in reads) > KEPT:
        return list(extents)  # of each part of them it is looked at when it is read
    missing = [x for x in reads if not _holds(head, x)]
    found = iter((yield from read_all(missing)))
    kept = iter(
        head[x.offset : x.offset + x.length] if _holds(head, x) else next(found) for x in reads
    )
    return [replace(e, directory=next(kept)) if isinstance(e, SparseExtent) else e for e in extents]


def _holds(head: bytes, read: Read) -> bool:
    return read.file == 0 and read.offset + read.length <= len(head)
