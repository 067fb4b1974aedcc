"""Copying a range from one view to another, and as few bytes of it as can be.

Where the bytes come from is traced through the source: down to zeroes, to the base that the target
stands on, to layers that do not change any more, and to views that are made of no other.

    zeroes                              the target is told so
    what is below the target anyway     the target lets that be seen again
    anything else                       its bytes, from file to file where they are in files
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from imgfs.views.view import Origin, View
from imgfs.views.writable import Writable

MOST = 0x7FFFF000  # bytes of one answer, as of read(2)
LONG_S = 0.2  # after so long what is done is told


@dataclass(slots=True)
class Progress:
    """How many bytes have been copied: also when it ended by an error, or was cancelled."""

    done: int = 0


async def copy_range(
    source: View, source_offset: int, target: Writable, offset: int, length: int, progress: Progress
) -> None:
    """Copy a first part of the range, which may end beyond the source: at least one byte, unless
    there is none.

    The two ranges must not overlap in one view.  Raises what reading and writing raise.
    """
    end = min(source_offset + min(length, MOST), source.size)
    until = trio.current_time() + LONG_S
    at = source_offset
    while at < end:
        pieces = await whose(source, at, end - at, target.stands_on)
        if not pieces:
            return  # it was cut meanwhile
        for piece in pieces:
            while at < piece.end:
                to = offset + at - source_offset
                count = await _copy_first(source, _rest(piece, at), target, to)
                assert count > 0
                at += count
                progress.done += count
                if trio.current_time() > until:
                    return


def _rest(piece: Origin, start: int) -> Origin:
    return piece._replace(start=start, offset=piece.offset + start - piece.start)


async def _copy_first(source: View, piece: Origin, target: Writable, offset: int) -> int:
    """Copy a first part of the piece; returns how many bytes."""
    length = piece.end - piece.start
    is_shared, length = await target.share(offset, length, piece.of, piece.offset)
    if is_shared:
        return length
    of = piece.of
    if of is not None and of is target.stands_on:
        # Nobody has asked it yet where it is zero.
        first = (await whose(target.stands_on, piece.offset, length, None))[0]
        length = min(length, first.end - first.start)
        of = first.of
    if of is None:
        await target.write_zeroes(offset, length)
        return length
    return await target.take(offset, source, piece.start, length)


async def whose(view: View, offset: int, length: int, known: View | None) -> list[Origin]:
    """Whose bytes those of a first part of the range are in the end.

    `known` is looked at no closer.  Nothing where the view ends before the range.
    """
    if view is known:
        return [Origin(offset, offset + length, view, offset)]
    found: list[Origin] = []
    for piece in await view.trace(offset, length):
        if not isinstance(piece.of, View) or piece.of is view:
            found.append(piece)
            continue
        inner = await whose(piece.of, piece.offset, piece.end - piece.start, known)
        shift = piece.start - piece.offset
        found += [
            Origin(each.start + shift, each.end + shift, each.of, each.offset) for each in inner
        ]
        if not inner or found[-1].end < piece.end:
            break
    return found
