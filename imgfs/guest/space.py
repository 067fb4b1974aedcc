"""What is known of a guest's filesystem: above all which of its bytes are of no use to it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


def _nothing() -> array[int]:
    return array("Q")


@dataclass(frozen=True, slots=True)
class Filesystem:
    """Sizes are bytes; `free` counts from the filesystem's start.

    `free` is ascending and disjoint, start, end, start, end and so on: what may read as zeroes.
    Where that cannot be told for sure `left_whole` says why, and nothing is free.
    `not_shut_down` where that is because a guest had it mounted when its disk stopped.
    """

    kind: str  #: `ext4`, `xfs`, `ntfs`, `vfat`, `exfat`, `btrfs`, `swap`
    size: int
    label: str = ""
    uuid: str = ""
    used: int | None = None  #: as the filesystem itself would say it; None: not known
    free: array[int] = field(default_factory=_nothing)
    left_whole: str = ""
    not_shut_down: bool = False

    def __post_init__(self) -> None:
        if self.left_whole and self.free:
            raise ValueError(f"{self.kind}: left whole, and yet something is free")
