"""The text that describes a VMDK: a file of its own, or a part of a sparse extent.

VMware, "Virtual Disk Format 5.0", "The Descriptor File"; `encoding` as libvmdk's documentation
has it.  Everything here is pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from imgfs.errors import CorruptImage, UnsupportedFeature

LONGEST = 1 << 20  # bytes; qemu reads no more either
MOST_EXTENTS = 8192
NO_PARENT = 0xFFFFFFFF

CREATE_TYPES = {
    "custom",
    "monolithicSparse",
    "monolithicFlat",
    "streamOptimized",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "2GbMaxExtentSparse",
    "2GbMaxExtentFlat",
    "vmfs",
    "vmfsThin",
    "vmfsPreallocated",
    "vmfsEagerZeroedThick",
    "vmfsSparse",
    "seSparse",
}
FLAT_TYPES = {"FLAT", "VMFS"}
SPARSE_TYPES = {"SPARSE", "VMFSSPARSE", "SESPARSE"}
MOST_SECTORS = 1 << 54  # of 512 bytes: 8 EiB

_EXTENT = re.compile(
    r"(?P<access>RW|RDONLY|NOACCESS)[ \t]+(?P<sectors>\d+)[ \t]+(?P<type>[A-Z]+)"
    r'(?:[ \t]+"(?P<name>[^"]*)"(?:[ \t]+(?P<offset>\d+))?)?(?=[ \t]|$)'
)
_SETTING = re.compile(r'(?P<key>[A-Za-z][A-Za-z0-9_.]*)[ \t]*=[ \t]*(?P<value>"[^"]*"|[^"]*)')
_TEXT_ENCODING = re.compile(r"windows-\d{3,4}|iso-8859-\d{1,2}|gbk|gb18030|big5|shift_jis|euc-kr")
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
# The suffixes that VMware's products give to the extents of NAME.vmdk.
_PART = re.compile(
    r".+-(?:[sf]\d{3,}|(?:\d{6}-)?(?:delta|sesparse)|flat|rdmp?|ctk|pt)\.vmdk", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One of the extents that make up the disk, one after the other."""

    type: str  #: FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE or SESPARSE
    sectors: int
    name: str = ""  #: of its file, as it stands there; ZERO: none
    offset_sectors: int = 0  #: FLAT: where it begins there


@dataclass(frozen=True, slots=True)
class Descriptor:
    create_type: str
    cid: int
    parent_cid: int
    parent_name: str  #: parentFileNameHint; empty: there is none
    extents: tuple[ExtentLine, ...]


def parse(name: str, text: bytes) -> Descriptor:
    """What the text says; it ends at a NUL, and lines that mean nothing to us are ignored.

    Raises UnsupportedFeature for versions and kinds of disks that are not known, CorruptImage for
    what cannot be; `name` begins the message.
    """
    settings: dict[str, str] = {}
    extents = []
    for line in _lines(text):
        if found := _EXTENT.match(line):
            extents.append(_extent(name, found))
            if len(extents) > MOST_EXTENTS:
                raise UnsupportedFeature(f"{name}: descriptor: more than {MOST_EXTENTS} extents")
        elif found := _SETTING.fullmatch(line):
            settings.setdefault(found["key"].lower(), found["value"].strip('"'))
    version = settings.get("version", "1")
    if version not in ("1", "2", "3"):
        raise UnsupportedFeature(f"{name}: descriptor: version={version!r} is not known")
    create_type = settings.get("createtype")
    if create_type is None:
        raise CorruptImage(
            f"{name}: descriptor: no createType; of a part of a disk open the .vmdk that lists it"
        )
    if create_type not in CREATE_TYPES:
        raise UnsupportedFeature(f"{name}: descriptor: createType={create_type!r} is not supported")
    descriptor = Descriptor(
        create_type,
        _content_id(name, "CID", settings.get("cid", "0")),
        _content_id(name, "parentCID", settings.get("parentcid", "ffffffff")),
        settings.get("parentfilenamehint", ""),
        tuple(extents),
    )
    if (descriptor.parent_cid != NO_PARENT) != bool(descriptor.parent_name):
        raise CorruptImage(
            f"{name}: descriptor: parentCID={descriptor.parent_cid:08x} with "
            f"parentFileNameHint={descriptor.parent_name!r}: it has a parent by one only"
        )
    return descriptor


def is_part(name: str) -> bool:
    """Whether a file's name looks as if another .vmdk listed it."""
    return _PART.fullmatch(name) is not None


def _lines(text: bytes) -> list[str]:
    """Stripped, without comments."""
    text = text.split(b"\0", 1)[0].removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n")
    lines = _decode(text).split("\n")
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def _decode(text: bytes) -> str:
    """Bytes that the encoding does not have stay what they are, as in names of files."""
    found = re.search(rb'(?m)^[ \t]*encoding[ \t]*=[ \t]*"?([\w-]{1,20})', text)
    label = found[1].decode("ascii", "replace").lower() if found else "utf-8"
    if _TEXT_ENCODING.fullmatch(label):
        try:
            return text.decode(label, "surrogateescape")
        except LookupError:
            pass
    return text.decode("utf-8", "surrogateescape")


def _extent(name: str, found: re.Match[str]) -> ExtentLine:
    where = f"{name}: descriptor: extent {found[0]!r}"
    kind, access = found["type"], found["access"]
    if kind not in FLAT_TYPES | SPARSE_TYPES | {"ZERO"}:
        raise UnsupportedFeature(f"{where}: type {kind} is not supported")
    if access == "NOACCESS" and kind != "ZERO":
        raise UnsupportedFeature(f"{where}: its bytes are not to be read")
    if len(found["sectors"]) > 17 or int(found["sectors"]) > MOST_SECTORS:
        raise CorruptImage(f"{where}: the size is absurd")
    if kind == "ZERO":
        return ExtentLine(kind, int(found["sectors"]))
    if not found["name"]:
        raise CorruptImage(f"{where}: it names no file")
    offset = found["offset"] or "0"
    if len(offset) > 17 or int(offset) > MOST_SECTORS:
        raise CorruptImage(f"{where}: the offset is absurd")
    return ExtentLine(kind, int(found["sectors"]), found["name"], int(offset))


def _content_id(name: str, key: str, value: str) -> int:
    if not _HEX.fullmatch(value):
        raise CorruptImage(f"{name}: descriptor: {key}={value!r} is no 32-bit hex number")
    return int(value, 16)
