"""What is on a guest's disk: partitions, logical volumes, what is in them, and what is free.

Nothing is free that is not inside of a filesystem that could be read and trusted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module

from imgfs.guest import gpt, mbr
from imgfs.guest.content import Content as Content
from imgfs.guest.hashed import Place, covered, covers_of
from imgfs.guest.lvm import LogicalVolume, find_volumes
from imgfs.guest.lvm_metadata import SECTOR, PhysicalVolume, read_label
from imgfs.guest.mbr_sector import find_sector
from imgfs.guest.segments import Segment, through, to_disk
from imgfs.guest.shutdown import still_in_use
from imgfs.guest.signature import FILESYSTEMS, Sample, lvm_label, sample, signatures
from imgfs.guest.signature_tables import LVM2, SUSPENDED_SWAP
from imgfs.guest.space import Filesystem
from imgfs.guest.tables import Slot, Table
from imgfs.steps import Steps, together

_TABLE = "partition table"
#: Types of partitions in which one cannot see what other disks have of the same volumes.
_SHARED_TYPES = {
    "0x42": "Windows dynamic disk",
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "Windows dynamic disk",
    "af9b60a0-1431-4f62-bc68-3311714a69ad": "Windows dynamic disk",
    "e75caf8f-f680-4cee-afa3-b001e56efc2d": "Windows storage space",
}
_SAMPLES_AT_ONCE = 64  # some 300 KiB each


@dataclass(frozen=True, slots=True)
class Partition:
    """Bytes.  Where `is_there` is not true its place is not inside of the disk, or shared."""

    number: int
    start: int
    size: int
    type: str  #: `0x83` of an MBR, a GUID of a GPT
    name: str
    is_there: bool
    content: Content


@dataclass(frozen=True, slots=True)
class Volume:
    """A logical volume; `name` is `vg-lv` as device-mapper has it, sizes are bytes.

    Without segments its bytes are not to be had: `content` says why.
    """

    name: str
    size: int
    segments: tuple[Segment, ...]
    content: Content


@dataclass(frozen=True, slots=True)
class Guest:
    """`table` is `mbr`, `gpt` or `none`; a disk without one has `whole` instead of partitions.

    `free` has the disk's ranges that may read as zeroes: ascending, disjoint, not touching; start,
    end, start, end.  `left_whole` is about all of the disk, and then nothing of it is free.
    """

    size: int
    table: str
    partitions: tuple[Partition, ...] = ()
    volumes: tuple[Volume, ...] = ()
    whole: Content | None = None
    free: array[int] = field(default_factory=lambda: array("Q"))
    left_whole: str = ""
    sector: int = SECTOR  #: bytes of what the partition table counts

    def contents(self) -> Iterable[tuple[str, Content]]:
        """What there is, with what a person calls it."""
        return ((what, content) for what, content, _ in self.places())

    def reasons(self) -> Iterator[tuple[str, str]]:
        """What is left whole, and why."""
        for what, content in self.contents():
            why = self.left_whole or content.left_whole
            if why:
                yield what, why

    def places(self) -> Iterator[tuple[str, Content, tuple[Segment, ...]]]:
        """As `contents`, and where its bytes are; nowhere if that cannot be, or is not known."""
        if self.whole is not None:
            yield "disk", self.whole, (_segment(0, self.size),)
        for partition in self.partitions:
            place = (_segment(partition.start, partition.size),) if partition.is_there else ()
            yield f"partition {partition.number}", partition.content, place
        for volume in self.volumes:
            yield f"volume {volume.name}", volume.content, volume.segments


def look_at_disk(size: int) -> Steps[Guest]:
    """Look at file 0, a disk of `size` bytes.  Never raises for what is on it."""
    if size == 0:
        return Guest(0, "none")
    ends = yield from sample(0, size)
    table = yield from _table(ends)
    samples = yield from _samples(table, size)
    if table.kind == "mbr":
        table, samples = yield from _in_its_sectors(table, samples, ends)
    names = signatures(ends)
    if not table.kind:
        names += [_TABLE] if gpt.is_signed(ends) else []
        ranges = [_Range(Slot(0, 0, size, ""), ends, names)]
    else:
        ranges = [
            _Range(slot, each, _names_in(slot, each))
            for slot, each in zip(table.slots, samples, strict=True)
        ]
    contents, volumes = yield from _look_into(ranges)
    contents, volumes = yield from _keep_what_others_need(ranges, contents, volumes)
    guest = Guest(
        size,
        table.kind or "none",
        _partitions(table, contents),
        tuple(volumes),
        None if table.kind else contents[0],
        left_whole=table.refused,
        sector=table.sector,
    )
    if table.kind and names and not guest.left_whole:
        guest = replace(guest, left_whole=f"besides its {_TABLE} it is {' and '.join(names)}")
    for what, content in guest.contents():
        if SUSPENDED_SWAP in content.holds:
            why = f"{what} is a {SUSPENDED_SWAP}: the guest sleeps, and trusts its disk to stay"
            guest = replace(guest, left_whole=why)
    return guest if guest.left_whole else replace(guest, free=_free(guest))


def _table(ends: Sample) -> Steps[Table]:
    """The partition table; one of kind `` where there is none."""
    entries = mbr.entries(ends.at(0, SECTOR))
    if entries is None or not any(entry.type for entry in entries):
        return Table("")
    if any(entry.type == mbr.PROTECTIVE for entry in entries):
        return (yield from gpt.read_table(entries, ends))
    return (yield from _mbr(ends, entries, SECTOR))


def _samples(table: Table, size: int) -> Steps[list[Sample]]:
    """Of all partitions; also of those that are refused: a sleeping swap may be there."""
    jobs = [sample(slot.start, min(slot.size, size - slot.start)) for slot in table.slots]
    return (yield from together(jobs, _SAMPLES_AT_ONCE))


def _in_its_sectors(
    table: Table, samples: list[Sample], ends: Sample
) -> Steps[tuple[Table, list[Sample]]]:
    """The MBR, and the samples of its partitions, in the sectors that it counts."""
    entries = mbr.entries(ends.at(0, SECTOR)) or []
    known = {
        slot.start for slot, each in zip(table.slots, samples, strict=True) if signatures(each)
    }
    if any(slot.number > mbr.MOST_PRIMARY for slot in table.slots):
        known |= {each.first * SECTOR for each in entries if each.type in mbr.EXTENDED}
    sector, why = yield from find_sector(ends.size, entries, known)
    if why:
        slots = tuple(replace(slot, refused=why) for slot in table.slots)
        return replace(table, slots=slots, refused=why), samples
    if sector != SECTOR:
        table = yield from _mbr(ends, entries, sector)
        samples = yield from _samples(table, ends.size)
    return table, samples


def _mbr(ends: Sample, entries: list[mbr.Entry], sector: int) -> Steps[Table]:
    table = yield from mbr.read_table(ends.size, entries, sector)
    if gpt.is_signed(ends) and not table.refused:
        why = "it has an MBR with partitions, and a GPT that the MBR does not speak of"
        table = replace(table, refused=why)
    return table


def _names_in(slot: Slot | None, ends: Sample) -> list[str]:
    names = signatures(ends)
    if slot is not None and slot.type in _SHARED_TYPES:
        names.append(_SHARED_TYPES[slot.type])
    entries = mbr.entries(ends.at(0, SECTOR)) or []
    nested = any(entry.type for entry in entries) or gpt.is_signed(ends)
    return [*names, _TABLE] if nested else names


@dataclass(frozen=True, slots=True)
class _Range:
    slot: Slot
    ends: Sample
    names: list[str]


def _look_into(ranges: list[_Range]) -> Steps[tuple[list[Content], list[Volume]]]:
    """What the ranges hold, and the volumes that are on them; all at the same time."""
    physical = {
        index: _physical_volume(each)
        for index, each in enumerate(ranges)
        if each.names == [LVM2] and not each.slot.refused
    }
    contents: list[Content] = []
    volumes: list[Volume] = []

    def partitions() -> Steps[None]:
        jobs = [_content(each.names, each.slot, each.ends) for each in ranges]
        contents.extend((yield from together(jobs)))

    def logical() -> Steps[None]:
        found = yield from find_volumes(list(physical.values()))
        volumes.extend((yield from _look_into_volumes(found)))

    yield from together([partitions(), logical()] if physical else [partitions()])
    for index, each in physical.items():
        if each.refused:
            contents[index] = replace(contents[index], left_whole=each.refused)
    return contents, volumes


def _physical_volume(each: _Range) -> PhysicalVolume:
    offset = lvm_label(each.ends)
    return read_label(each.slot.start, each.slot.size, each.ends.at(offset, SECTOR), offset)


def _look_into_volumes(found: list[LogicalVolume]) -> Steps[list[Volume]]:
    shown = [each for each in found if each.segments]
    jobs = [through(sample(0, each.size), each.segments) for each in shown]
    samples = yield from together(jobs, _SAMPLES_AT_ONCE)
    looks = [
        through(_content(_names_in(None, ends), Slot(0, 0, each.size, ""), ends), each.segments)
        for each, ends in zip(shown, samples, strict=True)
    ]
    contents = iter((yield from together(looks)))
    return [
        Volume(
            each.name,
            each.size,
            each.segments,
            next(contents) if each.segments else Content(left_whole=each.refused),
        )
        for each in found
    ]


def _keep_what_others_need(
    ranges: list[_Range], contents: list[Content], volumes: list[Volume]
) -> Steps[tuple[list[Content], list[Volume]]]:
    """The same; left whole what something else on the disk depends on."""
    places, types = [], []
    for each, content in zip(ranges, contents, strict=True):
        slot = each.slot
        there = () if slot.refused else (_segment(slot.start, slot.size),)
        name = f"partition {slot.number}" if slot.number else "disk"
        places.append(Place(name, content, there))
        types.append(slot.type)
    places += [Place(f"volume {each.name}", each.content, each.segments) for each in volumes]
    types += [""] * len(volumes)
    for place, why in zip(places, (yield from covered(places)), strict=True):
        place.content = place.content.kept(why) if why else place.content
    why = still_in_use(
        (each.name, type, each.content) for each, type in zip(places, types, strict=True)
    )
    for place in places if why else []:
        found = place.content.filesystem
        if found is not None and found.kind == "swap" and not place.content.left_whole:
            place.content = place.content.kept(why)
    found_in = [each.content for each in places]
    rest = zip(volumes, found_in[len(ranges) :], strict=True)
    return found_in[: len(ranges)], [replace(volume, content=each) for volume, each in rest]


def _content(names: list[str], slot: Slot, ends: Sample) -> Steps[Content]:
    found = yield from _look_inside(names, slot)
    is_empty = not any(any(data) for _, data in ends.parts)
    return replace(found, covers=covers_of(names, slot.type, ends), is_empty=is_empty)


def _look_inside(names: list[str], slot: Slot) -> Steps[Content]:
    holds, size = tuple(names), slot.size
    if slot.refused:
        return Content(holds, left_whole=slot.refused)
    if not names:
        return Content(left_whole="nothing is known of what it holds")
    if len(names) > 1:
        why = f"there are signatures of {' and '.join(names)}"
        return Content(holds, left_whole=why)
    if names[0] == _TABLE:
        return Content(holds, left_whole="it has a partition table that nothing leads to")
    if names[0] not in FILESYSTEMS:
        return Content(holds, left_whole=f"it is {names[0]}" if names[0] != LVM2 else "")
    module = import_module(f"imgfs.guest.{names[0]}")
    found: Filesystem = yield from module.look(slot.start, size)
    end = max(found.size, found.free[-1] if found.free else 0)
    if end > size and not found.left_whole:
        why = f"it has {end} bytes, and its place {size}"
        found = replace(found, free=array("Q"), left_whole=why)
    return Content(holds, found, found.left_whole)


def _partitions(table: Table, contents: list[Content]) -> tuple[Partition, ...]:
    return tuple(
        Partition(
            slot.number,
            slot.start,
            slot.size,
            slot.type,
            slot.name,
            not slot.refused,
            content,
        )
        for slot, content in zip(table.slots, contents, strict=False)
    )


def _segment(start: int, size: int) -> Segment:
    return Segment(0, size, (start,), size)


def _free(guest: Guest) -> array[int]:
    """Of all filesystems together, as the disk's ranges."""
    ranges = [
        each
        for _, content, segments in guest.places()
        if content.filesystem is not None
        for each in to_disk(content.filesystem.free, segments)
    ]
    ranges.sort()
    free = array("Q")
    for start, end in ranges:
        if free and free[-1] == start:
            free[-1] = end
        else:
            free.extend((start, end))
    return free
