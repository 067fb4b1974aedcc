"""Whether a guest was shut down, as far as its disk says: else it may go on with its swap.

A guest that its hypervisor suspended or saved has its memory elsewhere, and in there is where
in the swap its pages are.  Its disk shows it by a filesystem that is in use.
"""

from __future__ import annotations

from collections.abc import Iterable

from imgfs.guest.content import Content
from imgfs.guest.signature_tables import LVM2

#: Types of partitions that hold no filesystem.
BOOT_TYPES = {
    "21686148-6449-6e6f-744e-656564454649",  # BIOS boot
    "9e1a2f38-c612-4316-aa26-8b49521e5a8b",  # PReP
    "e3c9e316-0b5c-4db8-817d-f92df00215ae",  # Microsoft reserved
    "0x41",  # PReP
}
#: It is at any time as after being unmounted, but for a log tree.
_NEVER_SAYS = ("btrfs",)


def still_in_use(contents: Iterable[tuple[str, str, Content]]) -> str:
    """Why the swap on a disk with these contents (what, type of the partition) may be in use, or
    nothing."""
    doubts = []
    for what, type, content in contents:
        found = content.filesystem
        if found is not None and found.not_shut_down:
            why = found.left_whole
            return f"another filesystem of this disk was not shut down: {what}: {why}"
        doubt = _doubt(type, content)
        if doubt:
            doubts.append(f"{what}: {doubt}")
    if doubts:
        return f"another filesystem of this disk may not be shut down: {doubts[0]}"
    return ""


def _doubt(type: str, content: Content) -> str:
    found = content.filesystem
    if found is not None and found.kind == "swap":
        return ""
    if found is not None and not content.left_whole and found.kind in _NEVER_SAYS:
        return f"{found.kind} does not say whether it was unmounted"
    if content.is_empty or (not content.holds and type in BOOT_TYPES):
        return ""
    return "" if content.holds == (LVM2,) and not content.left_whole else content.left_whole
