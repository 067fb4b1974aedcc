"""Writing a snapshot's changes into its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from imgfs.image import WritableImage
from imgfs.pieces import Kind
from imgfs.views.delta import changes
from imgfs.views.drive import all_of
from imgfs.views.overlay import OverlayView

_PIECE = 1 << 20
_AT_ONCE = 8


async def write_changes(
    disk: OverlayView, base: WritableImage, progress: Callable[[int], None]
) -> None:
    """Make the base's bytes those of the disk, and durable; can be done again from the start.

    `progress` hears of bytes that have been written.  Raises what reading and writing raise.
    """
    if base.size != disk.size:
        await base.resize(disk.size)

    async def write(start: int, end: int) -> None:
        await base.write(start, await disk.read(start, end - start))
        progress(end - start)

    batch = []
    for kind, start, end in _steps(disk):
        if kind == Kind.ZERO:
            await base.zero(start, end - start)
            continue
        batch.append(partial(write, start, end))
        if len(batch) == _AT_ONCE:
            await all_of(batch)
            batch = []
    await all_of(batch)
    await base.flush()


def _steps(disk: OverlayView) -> Iterator[tuple[Kind, int, int]]:
    for piece in changes(disk):
        if piece.kind == Kind.ZERO:
            yield Kind.ZERO, piece.start, piece.end
        elif piece.kind == Kind.DATA:
            for start in range(piece.start, piece.end, _PIECE):
                yield Kind.DATA, start, min(start + _PIECE, piece.end)
