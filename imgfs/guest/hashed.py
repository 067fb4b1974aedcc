"""Which filesystems are covered by hashes of all of their blocks, those that are free too.

dm-verity has a tree of hashes: behind the filesystem in its own partition, or in another one, with
a superblock that says how much is hashed or (Android, ChromeOS) without.  dm-integrity may keep
its tags on another device, and a snapshot's exception store needs every block of its origin.  A
block that reads as zeroes where it did not is an error to all of them.

A hash tree without a superblock has no mark of its own.  So whatever is not zero between the end of
a filesystem and the end of its place counts as one, if there is enough room for one.

The superblocks are those of cryptsetup's lib/verity/verity.c and Linux's drivers/md/dm-integrity.c,
the types of partitions those of the Discoverable Partitions Specification.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from imgfs.guest.content import Content, Cover
from imgfs.guest.segments import Segment, through
from imgfs.guest.shutdown import BOOT_TYPES
from imgfs.guest.signature import Sample
from imgfs.guest.signature_tables import (
    AVB_METADATA,
    DM_INTEGRITY,
    DM_SNAPSHOT,
    DM_VERITY,
    VERITY_MAGIC,
    VERITY_TYPES,
)
from imgfs.steps import Read, Steps, read_all, together

_SECTOR = 512
_VERITY = struct.Struct("<8sII16s32sIIQ")  # up to data_blocks
_INTEGRITY = struct.Struct("<8sBBHIQ")  # up to provided_data_sectors
_BLOCK = 4096  # of data and of hashes, as mostly
_HASH = 32  # bytes that SHA-256 and SHA-1 take in a block
_HASHES = {b"sha1": 32, b"sha256": 32, b"sha512": 64}
_LARGEST_HASH = 64
_LARGEST_BLOCK = 64 << 10  # of data that dm-verity hashes; a page of the largest kind
_SMALLEST_TREE = 4096  # a tree has at least one byte for so many of its data: 16 for 64 KiB
_USUAL_TREE = 128  # 32 bytes for 4 KiB
_ALL_READ = 16 << 20  # of what is behind a filesystem; of more, the ends and probes in between
_END_READ = 4 << 20
_CHUNK = 4 << 20
_PROBE = 4096
_MOST_PROBES = 8192


class Place:
    """A content, what a person calls it, and where its bytes are."""

    def __init__(self, name: str, content: Content, segments: Sequence[Segment]) -> None:
        self.name = name
        self.content = content
        self.segments = segments
        self.size = sum(each.size for each in segments)


def covers_of(names: Sequence[str], type: str, ends: Sample) -> tuple[Cover, ...]:
    """What a range with these signatures and of this type of partition covers elsewhere."""
    found = []
    if DM_VERITY in names:
        found.append(_verity(ends.at(0, _SECTOR)))
    elif type in VERITY_TYPES:
        found.append(Cover(DM_VERITY))
    if DM_INTEGRITY in names:
        sectors: int = _INTEGRITY.unpack_from(ends.at(0, _SECTOR))[5]
        found.append(Cover(DM_INTEGRITY, sectors * _SECTOR or None))
    found += [Cover(name) for name in (AVB_METADATA, DM_SNAPSHOT) if name in names]
    if not names and not found and type not in BOOT_TYPES:
        roots = _roots(ends.at(0, 2 * _BLOCK))
        found += [Cover("what may be a tree of hashes", roots=roots)] if roots else []
    return tuple(found)


def _roots(head: bytes) -> int:
    """How many hashes there are in the first block, if it can be the top of a tree."""
    top = head[:_BLOCK].rstrip(b"\0")
    count = -(-len(top) // _HASH)
    slots = [top[at * _HASH : (at + 1) * _HASH] for at in range(count)]
    return count if all(len(set(each)) > _HASH // 4 for each in slots) else 0


def _roots_of(size: int) -> tuple[int, int]:
    """The levels of a tree for so many bytes of data, and the hashes at its top."""
    levels, count = 0, -(-size // _BLOCK)
    while count > _BLOCK // _HASH:
        levels, count = levels + 1, -(-count // (_BLOCK // _HASH))
    return levels, count


def _verity(sector: bytes) -> Cover:
    _, version, _, _, _, block, _, blocks = _VERITY.unpack_from(sector)
    sane = version == 1 and block >= _SECTOR and block.bit_count() == 1
    return Cover(DM_VERITY, block * blocks or None) if sane else Cover(DM_VERITY)


def _tree_end(sector: bytes) -> int:
    """Where the tree ends of which this is the superblock, at byte 0; at the latest."""
    _, _, _, _, name, _, block, count = _VERITY.unpack_from(sector)
    size = _HASHES.get(name.rstrip(b"\0"), _LARGEST_HASH)
    if not size < block <= 1 << 20:
        return 0
    end = int(block)
    while count > 1:
        count = -(-count // (block // size))
        end += count * block
    return end


def _more_trees(place: Place) -> Steps[list[Cover]]:
    """Of a place that begins with a superblock: other trees that are behind its own."""
    (sector,) = yield from through(read_all([Read(0, _SECTOR)]), place.segments)
    end = _tree_end(sector.ljust(_VERITY.size, b"\0"))
    why, covers = yield from through(_behind(end, place.size, _SECTOR), place.segments)
    return covers or ([Cover(DM_VERITY)] if why else [])


def covered(places: Sequence[Place]) -> Steps[list[str]]:
    """For each of the places why it is covered, or nothing."""
    why = [""] * len(places)
    wanted = [index for index, each in enumerate(places) if _has_something_free(each)]
    jobs = [through(_behind_filesystem(places[index]), places[index].segments) for index in wanted]
    trees = [each for each in places if DM_VERITY in each.content.holds and each.segments]
    covers = [(each.name, cover) for each in places for cover in each.content.covers]
    if not wanted:
        return why
    more = yield from together([_more_trees(each) for each in trees])
    covers += [(each.name, cover) for each, own in zip(trees, more, strict=True) for cover in own]
    for index, found in zip(wanted, (yield from together(jobs)), strict=True):
        why[index], own = found
        covers += [(places[index].name, cover) for cover in own]
    for name, cover in covers:
        for index in _data_of(cover, places):
            size = "" if cover.size is None else f" of {cover.size} bytes"
            what = f"{name} has {cover.kind} over all blocks{size}, those that are free too"
            why[index] = why[index] or what
    return [each if index in wanted else "" for index, each in enumerate(why)]


def _has_something_free(place: Place) -> bool:
    found = place.content.filesystem
    return found is not None and found.kind != "swap" and bool(found.free) and bool(place.segments)


def _end(place: Place) -> int:
    """Where the filesystem ends."""
    found = place.content.filesystem
    assert found is not None
    return min(max(found.size, found.free[-1] if found.free else 0), place.size)


def _data_of(cover: Cover, places: Sequence[Place]) -> list[int]:
    """The places that may be the data device: those that are as large as that, or hold a filesystem
    that is; if none is, all that are not smaller."""
    if cover.size is None and cover.roots is None:
        return list(range(len(places)))
    if cover.size is None:
        return [index for index, each in enumerate(places) if _has_roots(cover, each)]
    fitting = []
    for index, each in enumerate(places):
        found = each.content.filesystem
        least = each.size if found is None else min(found.size, each.size)
        if least - _LARGEST_BLOCK < cover.size <= each.size:
            fitting.append(index)
    return fitting or [index for index, each in enumerate(places) if cover.size <= each.size]


def _has_roots(cover: Cover, place: Place) -> bool:
    """Whether a tree for the filesystem, or for all of its place, has that many at its top."""
    if place.content.filesystem is None or cover.roots is None:
        return False
    least, most = _roots_of(_end(place)), _roots_of(place.size)
    return least <= (least[0], cover.roots) <= most or least <= (most[0], cover.roots) <= most


def _behind_filesystem(place: Place) -> Steps[tuple[str, list[Cover]]]:
    end = _end(place)
    return (yield from _behind(end, place.size, max(_SECTOR, end // _SMALLEST_TREE)))


def _behind(end: int, size: int, least: int) -> Steps[tuple[str, list[Cover]]]:
    """What lies in file 0 from `end` on: why that may be a tree of at least so many bytes, and
    superblocks of such."""
    room = size - end
    if room < least:
        return "", []
    why, covers = "", []
    for start, stop in _ranges(end, size):
        (data,) = yield from read_all([Read(start, stop - start)])
        if data.count(0) == len(data):
            continue
        first = start + len(data) - len(data.lstrip(b"\0"))
        why = why or f"what is behind it, at byte {first}, may be a tree of hashes of its blocks"
        for at in _superblocks(data, start):
            cover = _verity(data[at - start : at - start + _SECTOR].ljust(_VERITY.size, b"\0"))
            covers.append(cover)
            if len(covers) == 1:
                why = f"a superblock of dm-verity is behind it, at byte {at}: free blocks count too"
    if why or room <= _ALL_READ:
        return why, covers
    step = max(end // _USUAL_TREE // _PROBE * _PROBE, _PROBE)
    probes = range(end // _PROBE * _PROBE + _END_READ, size - _END_READ, step)
    if len(probes) > _MOST_PROBES:
        return f"what is behind it, {room} bytes, is too much to look for a tree of hashes", covers
    for first in range(0, len(probes), 1024):
        reads = [Read(at, _PROBE) for at in probes[first : first + 1024]]
        for each, data in zip(reads, (yield from read_all(reads)), strict=True):
            if any(data):
                at = each.offset
                return f"what is behind it, at byte {at}, may be a tree of hashes", covers
    return "", covers


def _ranges(start: int, end: int) -> list[tuple[int, int]]:
    """What is read whole of that, in parts."""
    if end - start <= _ALL_READ:
        parts = [(start, end)]
    else:
        parts = [(start, start + _END_READ), (end - _END_READ, end)]
    return [
        (at, min(at + _CHUNK, stop)) for begin, stop in parts for at in range(begin, stop, _CHUNK)
    ]


def _superblocks(data: bytes, start: int) -> list[int]:
    """Where in file 0 superblocks of dm-verity are in the data that begins at `start`."""
    found, at = [], data.find(VERITY_MAGIC)
    while at >= 0:
        if (start + at) % _SECTOR == 0:
            found.append(start + at)
        at = data.find(VERITY_MAGIC, at + 1)
    return found[:16]
