"""The extent map of an NBD export, out of base:allocation's block status (proto.md, "Metadata
querying" and NBD_REPLY_TYPE_BLOCK_STATUS).

The image is divided into segments of nearly 4 GiB, the longest that a request can ask about.  A
segment is asked for when something in it is wanted, and once; as many requests as the server
needs to describe it, each beginning where the answer to the last one ended.  A few segments are
asked for at once, so that a long round trip does not count for each of them.

What is not known is data: when the server refuses a question; when the image is so large, its map
so fragmented, or the server so slow that the answer would take too long (`MOST_REQUESTS`,
`MOST_EXTENTS`, the patience).  What contradicts itself is a ProtocolViolation.

A claim is taken for the bytes it names, also where these are no whole blocks; but the next
question begins at a whole block.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import accumulate

import trio

from imgfs.errors import (
    ImgfsError,
    ProtocolViolation,
    SourceChanged,
    SourceUnreachable,
    UnsupportedFeature,
)
from imgfs.extents import ExtentList, ExtentListBuilder, Flags, all_data

log = logging.getLogger(__name__)

#: Below 2^32, and whole blocks of any size.
SEGMENT = (1 << 32) - (1 << 26)
MOST_REQUESTS = 1 << 16
MOST_EXTENTS = 8 << 20
AT_ONCE = 8
MANY = 20_000  # numbers, that take some milliseconds to look at
KNOWN = int(Flags.HOLE | Flags.ZERO)  # clients must ignore the other bits

#: Asks for [offset, offset+length) and gives lengths and flags by turns.
Ask = Callable[[int, int], Awaitable[list[int]]]


def decode(where: str, entries: list[int], start: int, end: int, block: int) -> ExtentList:
    """What a reply says of `[start, end)`, from `start` as far as it goes, in whole blocks.

    `end` is what was asked for; the last extent may go beyond it.  A reply that does not get as far
    as one block leaves that block data.  Raises ProtocolViolation for an extent without length.
    """
    lengths, flags = entries[0::2], bytes(flag & KNOWN for flag in entries[1::2])
    if not lengths or len(lengths) != len(flags) or min(lengths) == 0:
        raise ProtocolViolation(f"{where}: the server sent a block status without length")
    reached = start + sum(lengths)
    stop = end if reached >= end else reached - reached % block
    if stop <= start:
        return all_data(start, min(end, start + block))
    builder = ExtentListBuilder(start)
    ends = accumulate(lengths, initial=start)
    next(ends)
    for at, flag in zip(ends, flags, strict=True):
        if at >= stop:
            builder.append(stop, flag)
            break
        builder.append(at, flag)
    return builder.finish(stop)


def joined(start: int, lists: Iterator[ExtentList]) -> ExtentList:
    """Lists that follow each other, the first from `start`, as one."""
    ends: array[int] = array("Q")
    flags = bytearray()
    for part in lists:
        if not part.ends:
            continue
        if flags and flags[-1] == part.flags[0]:
            ends.pop()
            flags.pop()
        ends.extend(part.ends)
        flags += part.flags
    return ExtentList(start, ends, bytes(flags))


class NbdExtents:
    """The map of one export; asks `ask` for what is not known yet.  Offsets are bytes."""

    def __init__(
        self, where: str, size: int, block: int, least_step: int, patience_s: float, ask: Ask
    ) -> None:
        """`least_step`: the longest question that every server takes; `block`: its block size."""
        self._where = where
        self._size = size
        self._block = block
        self._step = SEGMENT
        self._least_step = least_step
        self._patience_s = patience_s
        self._ask = ask
        self._segments: dict[int, ExtentList] = {}
        self._asking = trio.Lock()
        self._requests = 0
        self._extents = 0
        self._gave_up = ""
        self._refused = False

    async def of(self, start: int, end: int) -> ExtentList:
        """The extents of `[start, end)`, which is not empty and inside the image.

        Raises ProtocolViolation, SourceChanged, SourceUnreachable; what was learnt until then, or
        until it was cancelled, is kept.
        """
        wanted = range(start // SEGMENT, (end - 1) // SEGMENT + 1)
        async with self._asking:
            await self._learn(wanted)
        return joined(start, self._parts(start, end, wanted))

    def forget(self) -> None:
        """The image was written: what is known of it is so no more."""
        self._segments.clear()

    def _parts(self, start: int, end: int, wanted: range) -> Iterator[ExtentList]:
        at = start
        for index in sorted(self._segments) if len(wanted) > 1 else wanted:
            segment = self._segments.get(index)
            if segment is None or index not in wanted:
                continue
            a, b = max(start, segment.start), min(end, segment.end)
            if a > at:
                yield all_data(at, a)
            yield segment.clip(a, b)
            at = b
        if at < end:
            yield all_data(at, end)

    async def _learn(self, wanted: range) -> None:
        """Fill in the segments, as far as that is reasonable."""
        missing = (index for index in wanted if index not in self._segments)
        failed: list[ImgfsError] = []
        with trio.move_on_after(self._patience_s) as patience:
            async with trio.open_nursery() as nursery:

                async def work() -> None:
                    for index in missing:
                        if self._gave_up:
                            return
                        try:
                            self._segments[index] = await self._segment(index)
                        except ImgfsError as exc:
                            failed.append(exc)
                            nursery.cancel_scope.cancel()

                for _ in range(min(AT_ONCE, len(wanted))):
                    nursery.start_soon(work)
        if failed:
            raise failed[0]
        if patience.cancelled_caught:
            self._give_up(f"that takes longer than {self._patience_s:g} s")

    async def _segment(self, index: int) -> ExtentList:
        start = index * SEGMENT
        end = min(start + SEGMENT, self._size)
        parts: list[ExtentList] = []
        at = start
        while at < end:
            found = None if self._gave_up else await self._one(at, end)
            parts.append(all_data(at, end) if found is None else found)
            at = parts[-1].end
        return joined(start, iter(parts))

    async def _one(self, start: int, end: int) -> ExtentList | None:
        """One question; None when it is of no use to ask."""
        end = min(end, start + self._step)
        self._requests += 1
        try:
            entries = await self._ask(start, end - start)
        except UnsupportedFeature as exc:
            if self._step > self._least_step:
                self._step = self._least_step
                return await self._one(start, end)
            self._refusal(exc)
            return None
        except (ProtocolViolation, SourceChanged, SourceUnreachable):
            raise
        except ImgfsError as exc:
            self._refusal(exc)
            return None
        check = partial(decode, self._where, entries, start, end, self._block)
        found = await trio.to_thread.run_sync(check) if len(entries) > MANY else check()
        self._extents += len(found)
        if self._requests >= MOST_REQUESTS:
            self._give_up(f"that takes more than {MOST_REQUESTS} requests")
        elif self._extents >= MOST_EXTENTS:
            self._give_up(f"they are more than {MOST_EXTENTS}")
        return found

    def _refusal(self, exc: ImgfsError) -> None:
        if not self._refused:
            log.warning("%s; taking that for data", exc)
        self._refused = True

    def _give_up(self, why: str) -> None:
        if not self._gave_up:
            self._gave_up = why
            log.warning("%s: not asking for all extents: %s; the rest is data", self._where, why)
