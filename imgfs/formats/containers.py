"""Files that hold an image in a way that imgfs does not read: archives, compressed files, backups.

They are named, and never taken for raw disks.  Each entry has what stands at which offset, by the
formats' own descriptions; where a magic number is short more of the header is looked at.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Container:
    """`what` is for messages; `advice` says how to get at the disk inside; {} is the file name."""

    what: str
    advice: str


_NBDKIT = "imgfs 'nbd+command:nbdkit -r --filter={} file {{}}' MOUNTPOINT shows what is in it"
_UNPACK = "unpack it first"

CONTAINERS = {
    "xz": Container("an xz-compressed file", _NBDKIT.format("xz")),
    "gzip": Container("a gzip-compressed file", _NBDKIT.format("gzip")),
    "bzip2": Container("a bzip2-compressed file", _NBDKIT.format("bzip2")),
    "zstd": Container("a zstd-compressed file", "decompress it first: zstd -d {}"),
    "lz4": Container("an lz4-compressed file", "decompress it first: lz4 -d {}"),
    "lzop": Container("an lzop-compressed file", "decompress it first: lzop -d {}"),
    "lzip": Container("an lzip-compressed file", "decompress it first: lzip -d {}"),
    "ova": Container(
        "an OVA, a tar archive with a virtual machine's disks",
        "imgfs 'nbd+command:nbdkit -r --filter=tar file {} tar-entry=DISK.vmdk' MOUNTPOINT shows "
        "one of them; tar tf {} lists them",
    ),
    "tar": Container(
        "a tar archive",
        "imgfs 'nbd+command:nbdkit -r --filter=tar file {} tar-entry=NAME' MOUNTPOINT shows a file "
        "in it; tar tf {} lists them",
    ),
    "zip": Container("a zip archive", _UNPACK),
    "7z": Container("a 7-Zip archive", _UNPACK),
    "rar": Container("a RAR archive", _UNPACK),
    "cab": Container("a Windows cabinet archive", _UNPACK),
    "cpio": Container("a cpio archive", _UNPACK),
    "ar": Container("an ar archive or Debian package", _UNPACK),
    "rpm": Container("an RPM package", _UNPACK),
    "xar": Container("a xar archive", _UNPACK),
    "android-sparse": Container("an Android sparse image", "make it raw first: simg2img {} DISK"),
    "android-ota": Container("an Android update (payload.bin)", "extract its images first"),
    "ewf": Container("an EnCase (EWF) image", "ewfmount or xmount show the disk in it"),
    "aff": Container("an AFF image", "affuse or xmount show the disk in it"),
    "wim": Container("a Windows image (WIM) of files, not of a disk", "wimapply writes it to one"),
    "vma": Container("a Proxmox backup (VMA)", "extract its disks first: vma extract {} DIRECTORY"),
    "partclone": Container("a partclone image", "restore it first: partclone.restore"),
    "ntfsclone": Container("an ntfsclone image", "restore it first: ntfsclone --restore-image"),
    "sparseimage": Container("an Apple sparse image", "convert it on macOS: hdiutil convert"),
    "encrypted-dmg": Container("an encrypted Apple disk image", "decrypt it on macOS first"),
    "ciso": Container("a compressed ISO image (CISO)", "decompress it first"),
    "chd": Container("a compressed MAME image (CHD)", "extract it first: chdman extractraw"),
    "acronis": Container("an Acronis backup", "restore it with Acronis's own program"),
    "ghost": Container("a Norton Ghost image", "restore it with Ghost"),
}

_MAGICS = (
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x02\x21\x4c\x18", "lz4"),  # the legacy frame
    (b"\x89LZO\0\r\n\x1a\n", "lzop"),
    (b"LZIP\1", "lzip"),
    (b"PK\3\4", "zip"),
    (b"PK\5\6", "zip"),  # without a member
    (b"PK\7\x08PK\3\4", "zip"),  # one of several parts
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\7", "rar"),
    (b"MSCF\0\0\0\0", "cab"),
    (b"070701", "cpio"),
    (b"070702", "cpio"),
    (b"070707", "cpio"),
    (b"!<arch>\n", "ar"),
    (b"\xed\xab\xee\xdb", "rpm"),
    (b"xar!\0\x1c", "xar"),
    (struct.pack("<IH", 0xED26FF3A, 1), "android-sparse"),
    (b"CrAU", "android-ota"),
    (b"EVF\t\r\n\xff\0", "ewf"),
    (b"EVF2\r\n\x81\0", "ewf"),
    (b"LVF\t\r\n\xff\0", "ewf"),
    (b"AFF10\r\n\0", "aff"),
    (b"MSWIM\0\0\0", "wim"),
    (b"VMA\0\0\0\0\1", "vma"),
    (b"partclone-image", "partclone"),
    (b"\0ntfsclone-image", "ntfsclone"),
    (b"sprs", "sparseimage"),
    (b"encrcdsa", "encrypted-dmg"),
    (b"CISO", "ciso"),
    (b"MComprHD", "chd"),
    (b"\xb4\x6e\x68\x44", "acronis"),
    (b"\xfe\xef\1", "ghost"),
)
_TAIL_MAGIC = b"cdsaencr"  # an older encrypted dmg ends with it
_ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_TAR_CHECKSUM = slice(148, 156)


def container(head: bytes, tail: bytes) -> str | None:
    """The key in CONTAINERS of what begins and ends so, by a sector or more each; None if none."""
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    if _is_gzip(head):
        return "gzip"
    if head[:3] == b"BZh" and head[3:4] in b"123456789" and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    if len(head) >= 8 and int.from_bytes(head[:4], "little") in _ZSTD_SKIPPABLE:
        return "zstd"
    if _is_tar(head):
        first = head[:100].partition(b"\0")[0].lower()
        return "ova" if first.endswith((b".ovf", b"ova.xml")) else "tar"
    return "encrypted-dmg" if tail.endswith(_TAIL_MAGIC) else None


_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # a block's beginning, or the end of an empty file


def _is_gzip(head: bytes) -> bool:
    """RFC 1952: deflate, and no reserved flag."""
    return len(head) >= 18 and head[:3] == b"\x1f\x8b\x08" and not head[3] & 0xE0


def _is_tar(head: bytes) -> bool:
    """By the header's checksum: not each tar has a magic number (POSIX pax, "ustar")."""
    block = head[:512]
    if len(block) < 512 or not block[0]:
        return False
    text = block[_TAR_CHECKSUM].strip(b" \0")
    if not text or any(byte not in b"01234567" for byte in text):
        return False
    plain = sum(block) - sum(block[_TAR_CHECKSUM]) + 8 * ord(" ")
    return int(text, 8) == plain
