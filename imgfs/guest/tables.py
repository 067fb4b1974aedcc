"""What partition tables have in common: partitions, and which of them cannot be right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

SECTOR = 512


@dataclass(frozen=True, slots=True)
class Slot:
    """A partition as its table has it.  Bytes; `refused` says why it cannot be one, or nothing."""

    number: int
    start: int
    size: int
    type: str  #: `0x83` of an MBR, a GUID of a GPT
    name: str = ""
    refused: str = ""

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Table:
    """`refused` is about all of the disk: its partitions may be shown, but nothing is free."""

    kind: str  #: `mbr`, `gpt`, or `` for none
    slots: tuple[Slot, ...] = ()
    refused: str = ""
    sector: int = SECTOR  #: bytes of what it counts


def refuse_misplaced(
    slots: Sequence[Slot], size: int, kept: Iterable[tuple[int, int, str]]
) -> tuple[Slot, ...]:
    """The slots, those refused that leave the disk of `size` bytes, share bytes with each other, or
    with what the table itself keeps: (start, end, what it is)."""
    why = {slot.number: slot.refused for slot in slots}
    taken = [(slot.start, slot.end, f"partition {slot.number}", slot.number) for slot in slots]
    taken += [(start, end, what, 0) for start, end, what in kept]
    # Whatever overlaps something before it overlaps that which reaches farthest.
    farthest = (0, 0, "", 0)
    for each in sorted(taken):
        start, end, _, number = each
        if start < min(farthest[1], end):
            for mine, other in ((number, farthest), (farthest[3], each)):
                if mine and not why[mine]:
                    why[mine] = f"it overlaps {other[2]} at byte {start}"
        if number and end > size and not why[number]:
            why[number] = f"it ends at byte {end}, behind the disk of {size} bytes"
        farthest = max(farthest, each, key=lambda one: one[1])
    return tuple(replace(slot, refused=why[slot.number]) for slot in slots)
