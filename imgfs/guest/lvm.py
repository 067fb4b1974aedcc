"""LVM2: the logical volumes of the physical volumes on one disk, and where their bytes are.

Only what is linear or striped over physical volumes that are all here has such a place; what
LVM builds of other volumes (thin, raid, mirror, cache, snapshots and their origins) has not, or
someone else needs its unused bytes too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from imgfs.guest.lvm_metadata import SECTOR, PhysicalVolume, read_texts
from imgfs.guest.lvm_text import Section, Value
from imgfs.guest.segments import Segment
from imgfs.steps import Steps

_NAME = re.compile(r"[A-Za-z0-9+_.-]{1,127}")
_PLAIN = {"READ", "WRITE", "VISIBLE", "FIXED_MINOR", "ACTIVATION_SKIP"}
_MOST_SEGMENTS = 100_000
_MOST_CHUNKS = 1 << 20  # of a striped volume


class _Lie(Exception):
    """The metadata says something that cannot be."""


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """`name` is device-mapper's.  Where `refused` says why, there are no segments."""

    name: str
    size: int  #: bytes
    segments: tuple[Segment, ...] = ()
    refused: str = ""


@dataclass(slots=True)
class _Group:
    name: str
    extent: int  #: bytes
    physical: dict[str, PhysicalVolume | None]  #: None: on another disk
    first: dict[str, int]  #: byte of the disk at which its extents begin
    extents: dict[str, int]
    missing: set[str]
    used: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    segments: int = 0


def find_volumes(physical: list[PhysicalVolume]) -> Steps[list[LogicalVolume]]:
    """Those that can be seen, of all groups; `refused` of the physical volumes is filled in."""
    yield from read_texts(physical)
    found: list[LogicalVolume] = []
    groups: dict[bytes, Section] = {}
    for volume in physical:
        groups.update(volume.texts)
    by_id: dict[object, list[Section]] = {}
    for text in groups.values():
        for section in text.values():
            if isinstance(section, dict):
                by_id.setdefault(section.get("id"), []).append(text)
    names = Counter(_group_name(texts[0]) for texts in by_id.values())
    for texts in by_id.values():
        members = [each for each in physical if any(t in each.texts.values() for t in texts)]
        try:
            if names[_group_name(texts[0])] > 1:
                raise _Lie("there is another group of the same name")
            if len(texts) > 1:
                raise _Lie("its metadata is there in several versions")
            found += _volumes(texts[0], physical)
        except _Lie as lie:
            for member in members:
                member.refused = member.refused or str(lie)
    return found


def _group_name(text: Section) -> str:
    """Of the only section; `` where there are others or none."""
    names = [name for name, each in text.items() if isinstance(each, dict)]
    return names[0] if len(names) == 1 else ""


def _volumes(text: Section, physical: list[PhysicalVolume]) -> list[LogicalVolume]:
    name = _group_name(text)
    section = text.get(name)
    if not isinstance(section, dict):
        raise _Lie("its metadata is not of one group")
    group = _group(name, section, physical)
    logical = _sections(section, "logical_volumes")
    owners = _owners(logical, group)
    found = []
    for lv_name, lv in logical.items():
        if not _NAME.fullmatch(lv_name):
            raise _Lie(f"{lv_name!r} is no name of a logical volume")
        shown = _volume(group, lv_name, lv, owners.get(lv_name, ""))
        if "VISIBLE" in _strings(lv.get("status")):
            found.append(shown)
    for each, used in group.used.items():
        used.sort()
        for (_, end), (start, _) in pairwise(used):
            if start < end:
                raise _Lie(f"extent {start} of {each} belongs to two logical volumes")
    return found


def _group(name: str, section: Section, physical: list[PhysicalVolume]) -> _Group:
    if not _NAME.fullmatch(name):
        raise _Lie(f"{name!r} is no name of a group")
    group = _Group(name, _number(section, "extent_size", 1) * SECTOR, {}, {}, {}, set())
    for pv_name, pv in _sections(section, "physical_volumes").items():
        identity = str(pv.get("id")).replace("-", "")
        here = [each for each in physical if each.uuid == identity]
        if len(here) > 1:
            raise _Lie(f"physical volume {identity} is there {len(here)} times")
        volume = here[0] if here else None
        start = _number(pv, "pe_start", 1) * SECTOR
        count = _number(pv, "pe_count", 0)
        if volume is not None:
            _check_place(volume, pv_name, start, start + count * group.extent)
        if "MISSING" in _strings(pv.get("status")) + _strings(pv.get("flags")):
            group.missing.add(pv_name)
        group.physical[pv_name] = volume
        group.first[pv_name] = start + (volume.start if volume is not None else 0)
        group.extents[pv_name] = count
    for volume in physical:
        described = any(text.get(name) == section for text in volume.texts.values())
        if described and not any(each is volume for each in group.physical.values()):
            raise _Lie(f"physical volume {volume.uuid} is not in the group that it describes")
    return group


def _check_place(volume: PhysicalVolume, name: str, start: int, end: int) -> None:
    if volume.refused:
        raise _Lie(f"{name}: {volume.refused}")
    if end > volume.size:
        raise _Lie(f"the extents of {name} end at byte {end}, and it has {volume.size}")
    for offset, size in volume.areas:
        if offset < end and start < offset + size:
            raise _Lie(f"the extents of {name} overlap the metadata at byte {offset}")


def _owners(logical: dict[str, Section], group: _Group) -> dict[str, str]:
    """By logical volume: another one that is built of it, or sees it."""
    owners = {}
    for name, lv in logical.items():
        for segment in lv.values():
            if not isinstance(segment, dict):
                continue
            for key, value in segment.items():
                for each in _strings(value):
                    if each in logical and each != name and key not in ("type", "tags"):
                        owners[each] = name
                        # `stripes` names physical volumes first.
                        if key == "stripes" and each in group.physical:
                            del owners[each]
    return owners


def _volume(group: _Group, name: str, lv: Section, owner: str) -> LogicalVolume:
    """Notes what extents it uses, also where it is refused."""
    segments: list[Segment] = []
    why = f"{owner} is built of it" if owner else ""
    unknown = set(_strings(lv.get("status")) + _strings(lv.get("flags"))) - _PLAIN
    if unknown and not why:
        why = f"it is {', '.join(sorted(unknown))}"
    at = 0
    for index in range(1, _number(lv, "segment_count", 1) + 1):
        group.segments += 1
        if group.segments > _MOST_SEGMENTS:
            raise _Lie(f"the group has more than {_MOST_SEGMENTS} segments")
        part = lv.get(f"segment{index}")
        if not isinstance(part, dict):
            raise _Lie(f"{name} has no segment{index}")
        if _number(part, "start_extent", 0) * group.extent != at:
            raise _Lie(f"segment{index} of {name} does not begin where the one before ends")
        size = _number(part, "extent_count", 1) * group.extent
        if part.get("type") in ("striped", "linear"):
            segment = _segment(group, f"segment{index} of {name}", part, at, size)
            why = why or ("" if segment else "a part of it is on another disk, or missing")
            segments += [segment] if segment else []
        else:
            why = why or f"it is {part.get('type')}"
        at += size
    chunks = sum(each.size // each.stripe_size for each in segments)
    if chunks > _MOST_CHUNKS + len(segments):
        why = why or f"it has {chunks} chunks of stripes, more than {_MOST_CHUNKS}"
    shown = f"{group.name.replace('-', '--')}-{name.replace('-', '--')}"
    return LogicalVolume(shown, at, () if why else tuple(segments), why)


def _segment(group: _Group, what: str, part: Section, start: int, size: int) -> Segment | None:
    """None where one of its stripes is not here."""
    count = _number(part, "stripe_count", 1)
    places = list(_stripes(part.get("stripes")))
    chunk = size if count == 1 else _number(part, "stripe_size", 1) * SECTOR
    if len(places) != count or size % (count * chunk) or (size // group.extent) % count:
        raise _Lie(f"{what} has {size} bytes, {count} stripes of {chunk}, and {len(places)} places")
    extents = size // group.extent // count
    bases = []
    for name, first in places:
        if name not in group.physical:
            return None  # on another logical volume
        if first < 0 or first + extents > group.extents[name]:
            last = group.extents[name]
            raise _Lie(f"{what} uses extents {first} to {first + extents} of {name}, of {last}")
        group.used.setdefault(name, []).append((first, first + extents))
        if group.physical[name] is not None and name not in group.missing:
            bases.append(group.first[name] + first * group.extent)
    return Segment(start, size, tuple(bases), chunk) if len(bases) == count else None


def _stripes(value: object) -> Iterator[tuple[str, int]]:
    items: Sequence[object] = value if isinstance(value, list) else []
    for name, first in zip(items[::2], items[1::2], strict=False):
        if isinstance(name, str) and isinstance(first, int):
            yield name, first


def _sections(parent: Section, name: str) -> dict[str, Section]:
    found = parent.get(name, {})
    if not isinstance(found, dict):
        raise _Lie(f"{name} is no section")
    return {key: each for key, each in found.items() if isinstance(each, dict)}


def _number(section: Section, name: str, least: int) -> int:
    value = section.get(name)
    if not isinstance(value, int) or not least <= value < 1 << 54:
        raise _Lie(f"{name} is {value!r}")
    return value


def _strings(value: Value | Section | None) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
