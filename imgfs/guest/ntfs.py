"""NTFS: free is what $Bitmap says, where Windows or ntfs-3g left nothing else to be done.

What counts as clean is what ntfs-3g asks for before it writes: no dirty flag, a $LogFile that is
empty or whose newest restart page is of a closed volume, and no hibernated Windows.  Volume shadow
copies need more: what a file had when it was copied stays in clusters that are free now, until
they are written to.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from imgfs._native._tables import clear_runs
from imgfs.guest import ntfs_tables as tables
from imgfs.guest.doubt import BATCH, Doubt, NotShutDown, read_whole
from imgfs.guest.ntfs_files import Files, Stream
from imgfs.guest.ntfs_tables import Record
from imgfs.guest.runs import FreeRuns
from imgfs.guest.space import Filesystem
from imgfs.steps import Read, Steps

KIND = "ntfs"

_BOOT_AREA = 8192  # $Boot, which also has the header of the shadow copies
_LOG_READ = 128 << 10  # two restart pages of any size
_PAGES = tuple(1 << shift for shift in range(9, 17))
_HIBERNATION_FILE = "HIBERFIL.SYS"
_HIBERNATION_HEADER = 4096
_DIRECTORY = "$I30"
_MOST_INDEX = 32 << 20  # bytes of the root directory
_INDEX_BATCH = 256  # blocks
_INDEX_BLOCKS = tuple(1 << shift for shift in range(9, 17))
_MOST_CATALOG = 256  # blocks; Windows has 64 copies at most


def look(start: int, size: int) -> Steps[Filesystem]:
    """The filesystem at byte `start` of file 0, in a partition of `size` bytes."""
    try:
        return (yield from _look(start, size))
    except Doubt as doubt:
        return Filesystem(KIND, size, left_whole=str(doubt))


def _look(start: int, size: int) -> Steps[Filesystem]:
    if size < _BOOT_AREA:
        raise Doubt(f"the partition has {size} bytes")
    (area,) = yield from read_whole([Read(start, _BOOT_AREA)])
    boot = tables.parse_boot(area)
    covers = boot.sectors * boot.sector
    serial = f"{boot.serial:016X}"
    if covers > size:
        why = f"it has {boot.sectors} sectors of {boot.sector} bytes, and its partition {size}"
        return Filesystem(KIND, covers, uuid=serial, left_whole=f"{why} bytes")
    covers = min(covers + boot.sector, size)
    label, used, free, why, in_use = "", None, array("Q"), "", False
    try:
        (data,) = yield from read_whole([Read(start + boot.mft * boot.cluster, boot.record)])
        first = tables.parse_record(data, tables.MFT, boot.clusters)
        files = Files(start, boot, _first_of_mft(first))
        yield from files.load_mft(first)
        log, volume, root, bitmap = yield from files.records(
            [tables.LOGFILE, tables.VOLUME, tables.ROOT, tables.BITMAP]
        )
        label = _label(volume)
        _check_volume(volume)
        log_stream = yield from _check_log(files, log)
        yield from _check_hibernation(files, root)
        yield from _check_shadow_copies(start, size, area)
        bits = yield from _needed(files, bitmap)
        found = yield from _free(files, bits)
        _check_metadata(found, [files.mft, log_stream, bits], boot.cluster)
        free = found.found
        used = boot.clusters * boot.cluster - sum(free[1::2]) + sum(free[::2])
    except Doubt as doubt:
        why, in_use = str(doubt), isinstance(doubt, NotShutDown)
    return Filesystem(KIND, covers, label, serial, used, free, why, in_use)


def _first_of_mft(record: Record) -> Stream:
    for each in record.attributes:
        if each.kind == tables.DATA and not each.name and each.value is None:
            return Stream(each, "the MFT")
    raise Doubt("the MFT's record does not say where it is")


def _needed(files: Files, record: Record) -> Steps[Stream]:
    stream = yield from files.stream(record, tables.DATA)
    if stream is None:
        raise Doubt(f"record {record.number} of the MFT has no data")
    return stream


def _label(volume: Record) -> str:
    for each in volume.attributes:
        if each.kind == tables.VOLUME_NAME and each.value is not None:
            return each.value.decode("utf-16-le", "replace")
    return ""


def _check_volume(volume: Record) -> None:
    """Raises Doubt for a version that is not known, and where there is something to be done."""
    values = [e.value for e in volume.attributes if e.kind == tables.VOLUME_INFORMATION]
    if len(values) != 1 or values[0] is None or len(values[0]) < tables.VOLUME_INFO.size:
        raise Doubt("$Volume does not say which version it is of")
    major, minor, flags = tables.VOLUME_INFO.unpack_from(values[0])
    if (major, minor) not in tables.VERSIONS:
        raise Doubt(f"version {major}.{minor} of NTFS is not known")
    if flags & tables.DIRTY:
        raise NotShutDown(f"it is dirty: $Volume has flags {flags:#x}")
    if flags & ~tables.HARMLESS_FLAGS:
        raise Doubt(f"Windows has something to do to it: $Volume has flags {flags:#x}")


def _check_log(files: Files, record: Record) -> Steps[Stream]:
    """Raises Doubt unless the journal is empty, or was closed."""
    log = yield from _needed(files, record)
    size = min(log.size, _LOG_READ)
    if size < 2 * tables.BOOT_SIZE:
        raise Doubt(f"$LogFile has {log.size} bytes")
    # An empty one is 0xFF all through; ntfs-3g too looks only where a page may begin.
    pages = [(at, 8) for at in (_LOG_READ << shift for shift in range(32)) if at + 8 <= log.size]
    head, *later = yield from files.read(log, [(0, size), *pages])
    if head == b"\xff" * size and all(each == b"\xff" * 8 for each in later):
        return log
    page = _page_size(head)
    _, in_use, flags = max(_restart_page(head[at : at + page], at) for at in (0, page))
    if in_use != tables.NO_CLIENT and not flags & tables.VOLUME_IS_CLEAN:
        raise NotShutDown(f"$LogFile is in use: its restart area has flags {flags:#x}")
    return log


def _page_size(head: bytes) -> int:
    page: int = tables.RESTART_HEADER.unpack_from(head)[0]
    if head[:4] != tables.RESTART_MAGIC or page not in _PAGES or 2 * page > len(head):
        raise Doubt(f"$LogFile begins with {head[:4]!r}, and has pages of {page} bytes")
    return page


def _restart_page(data: bytes, at: int) -> tuple[int, int, int]:
    """Its LSN, first client in use, and flags."""
    what = f"the restart page at {at} of $LogFile"
    page = tables.fixed_up(data, tables.RESTART_MAGIC, what)
    _, _, area, minor, major = tables.RESTART_HEADER.unpack_from(page)
    if major != tables.LOG_MAJOR:
        raise Doubt(f"{what} has version {major}.{minor}: Windows may have kept it open")
    if area + tables.RESTART_AREA.size > len(page):
        raise Doubt(f"{what} has its area at {area}")
    lsn, in_use, flags = tables.RESTART_AREA.unpack_from(page, area)
    return lsn, in_use, flags


def _check_hibernation(files: Files, root: Record) -> Steps[None]:
    """Raises Doubt where there is a hibernated Windows, or the other half of its fast start."""
    for entry in (yield from _named(files, root, _HIBERNATION_FILE)):
        (record,) = yield from files.records([entry.number])
        if record.sequence != entry.sequence:
            raise Doubt(
                f"the root directory's {_HIBERNATION_FILE} is record {entry.number} with sequence"
                f" number {entry.sequence}, which has {record.sequence}"
            )
        stream = yield from _needed(files, record)
        if stream.size < _HIBERNATION_HEADER:
            raise Doubt(f"{_HIBERNATION_FILE} has {stream.size} bytes")
        (header,) = yield from files.read(stream, [(0, _HIBERNATION_HEADER)])
        if any(header):
            why = f"Windows is hibernated: {_HIBERNATION_FILE} begins with {header[:4]!r}"
            raise NotShutDown(why)


def _named(files: Files, root: Record, name: str) -> Steps[list[tables.Reference]]:
    """What goes by a name of ASCII letters in the root directory; all of its nodes are read, which
    needs no knowledge of how the names are ordered."""
    index = yield from files.stream(root, tables.INDEX_ROOT, _DIRECTORY)
    if index is None or index.value is None or len(index.value) < tables.INDEX_ROOT_SIZE:
        raise Doubt("the root directory has no index")
    size = int.from_bytes(index.value[tables.INDEX_BLOCK_SIZE_AT :][:4], "little")
    if size not in _INDEX_BLOCKS:
        raise Doubt(f"the root directory has blocks of {size} bytes")
    unit = files.boot.cluster if files.boot.cluster <= size else tables.BOOT_SIZE
    found: list[tables.Reference] = []
    nodes = _node(index.value, tables.INDEX_ROOT_SIZE, "the root directory", name, found)
    if not nodes:
        return found
    stream = yield from files.stream(root, tables.INDEX_ALLOCATION, _DIRECTORY)
    if stream is None:
        raise Doubt("the root directory has no blocks")
    seen: set[int] = set()
    while nodes:
        some, nodes = nodes[:_INDEX_BATCH], nodes[_INDEX_BATCH:]
        if not seen.isdisjoint(some) or len(set(some)) < len(some):
            raise Doubt("a block of the root directory is in it twice")
        seen.update(some)
        if len(seen) * size > _MOST_INDEX:
            raise Doubt(f"the root directory has more than {_MOST_INDEX} bytes")
        blocks = yield from files.read(stream, [(vcn * unit, size) for vcn in some])
        for vcn, block in zip(some, blocks, strict=True):
            what = f"block {vcn} of the root directory"
            data = tables.fixed_up(block, b"INDX", what)
            nodes += _node(data, tables.INDEX_BLOCK_HEADER, what, name, found)
    return found


def _node(
    data: bytes, header_at: int, what: str, name: str, found: list[tables.Reference]
) -> list[int]:
    """The VCNs of the nodes below; entries of that name are added to those found."""
    nodes = []
    for entry in tables.index_entries(data, header_at, what):
        if entry.node is not None:
            nodes.append(entry.node)
        same_length = len(entry.name) == 2 * len(name)
        if same_length and entry.name.decode("utf-16-le", "replace").upper() == name:
            found.append(entry.reference)
    return nodes


def _check_shadow_copies(start: int, size: int, area: bytes) -> Steps[None]:
    """Raises Doubt where there are any."""
    identity, _, kind, _, at = tables.SHADOW_HEADER.unpack_from(area, tables.SHADOW_AT)
    if identity != tables.SHADOW_ID or kind != tables.VOLUME_RECORD:
        return
    for _ in range(_MOST_CATALOG):
        if not at:
            return
        if at + tables.CATALOG_BLOCK > size:
            raise Doubt(f"the catalog of its shadow copies is at {at}")
        (block,) = yield from read_whole([Read(start + at, tables.CATALOG_BLOCK)])
        identity, _, kind, _, own, following = tables.CATALOG_HEADER.unpack_from(block)
        if identity != tables.SHADOW_ID or kind != tables.CATALOG_RECORD or own != at:
            raise Doubt(f"there is no catalog of its shadow copies at {at}")
        for entry in range(tables.CATALOG_ENTRY, len(block), tables.CATALOG_ENTRY):
            if int.from_bytes(block[entry : entry + 8], "little") in tables.COPY_ENTRIES:
                raise Doubt("it has volume shadow copies, which need what is in free clusters")
        at = following
    raise Doubt(f"the catalog of its shadow copies has more than {_MOST_CATALOG} blocks")


def _free(files: Files, bitmap: Stream) -> Steps[FreeRuns]:
    boot = files.boot
    length = -(-boot.clusters // 8)
    if min(bitmap.size, bitmap.initialized) < length:
        raise Doubt(f"$Bitmap has {bitmap.initialized} bytes for {boot.clusters} clusters")
    free = FreeRuns()
    for at in range(0, length, BATCH):
        (bits,) = yield from files.read(bitmap, [(at, min(BATCH, length - at))])
        first = at * 8
        clear = clear_runs(bits, min(len(bits) * 8, boot.clusters - first))
        free.extend(clear, boot.cluster, first, boot.clusters * boot.cluster)
    return free


def _check_metadata(free: FreeRuns, streams: Sequence[Stream], cluster: int) -> None:
    """Raises Doubt where a file that was read here is called free."""
    places = [(0, _BOOT_AREA, "$Boot")]
    for stream in streams:
        places += [
            (run.lcn * cluster, run.clusters * cluster, stream.what)
            for run in stream.runs
            if run.lcn is not None
        ]
    for start, length, what in places:
        index = bisect_right(free.found, start)
        if index % 2 or (index < len(free.found) and free.found[index] < start + length):
            raise Doubt(f"$Bitmap calls free what {what} has at {start}")
