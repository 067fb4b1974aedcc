"""Where a logical volume's bytes are on the disk, and looking at a volume through that."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from imgfs.steps import OpenFile, Read, Steps

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Segment:
    """`size` bytes of a volume from its byte `start` on.

    They go round over the stripes, `stripe_size` bytes to each; a stripe is named by the disk's
    byte at which it begins.  What lies on one stripe is contiguous there.
    """

    start: int
    size: int
    stripes: tuple[int, ...]
    stripe_size: int

    def before(self, stripe: int, offset: int) -> int:
        """How many of the segment's first `offset` bytes are on that stripe."""
        rounds, rest = divmod(offset, self.stripe_size * len(self.stripes))
        part = min(max(rest - stripe * self.stripe_size, 0), self.stripe_size)
        return rounds * self.stripe_size + part

    def on_disk(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The disk's ranges that hold the volume's [start, end), as far as it is in here; one or
        none a stripe, so not in the volume's order."""
        low, high = max(start - self.start, 0), min(end - self.start, self.size)
        if low >= high:
            return
        for number, base in enumerate(self.stripes):
            first, last = self.before(number, low), self.before(number, high)
            if first < last:
                yield base + first, base + last

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The disk's ranges in the volume's order, one for each visit of a stripe."""
        if len(self.stripes) == 1:
            yield self.stripes[0], self.stripes[0] + self.size
            return
        row = 0
        while row * len(self.stripes) < self.size:
            for base in self.stripes:
                yield base + row, base + row + self.stripe_size
            row += self.stripe_size


def through(steps: Steps[T], segments: Sequence[Segment]) -> Steps[T]:
    """Run `steps`, which read a volume as file 0, by reads of the disk."""
    answer: object = None
    failure: Exception | None = None
    while True:
        try:
            need = steps.send(answer) if failure is None else steps.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        assert not isinstance(need, OpenFile), "a volume names no files"
        reads = [
            Read(start, end - start)
            for each in need
            for segment in _overlapping(segments, each.offset, each.offset + each.length)
            for start, end in segment.on_disk(each.offset, each.offset + each.length)
        ]
        answer = failure = None
        try:
            found = iter((yield reads) if reads else [])
        except Exception as exc:
            failure = exc
            continue
        answer = [_assemble(each, segments, found) for each in need]


def _overlapping(segments: Sequence[Segment], start: int, end: int) -> Iterator[Segment]:
    """Those of the ascending segments that have bytes of the volume's [start, end)."""
    at = max(bisect_right(segments, start, key=lambda each: each.start) - 1, 0)
    while at < len(segments) and segments[at].start < end:
        if start < segments[at].start + segments[at].size:
            yield segments[at]
        at += 1


def to_disk(free: array[int], segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """The disk's ranges of a volume's ascending ranges (start, end, start, end), in no order."""
    if len(segments) == 1 and len(segments[0].stripes) == 1:
        shift = segments[0].stripes[0].__add__
        yield from zip(map(shift, free[::2]), map(shift, free[1::2]), strict=True)
        return
    for start, end in zip(free[::2], free[1::2], strict=True):
        for segment in _overlapping(segments, start, end):
            yield from segment.on_disk(start, end)


def _assemble(read: Read, segments: Sequence[Segment], found: Iterator[bytes]) -> bytes:
    """The volume's bytes out of the answers to that read's parts, in the order of the asking."""
    whole = bytearray()
    for segment in _overlapping(segments, read.offset, read.offset + read.length):
        low = max(read.offset - segment.start, 0)
        high = min(read.offset + read.length - segment.start, segment.size)
        if len(segment.stripes) == 1:
            whole += next(found)
            continue
        parts = {}
        for number in range(len(segment.stripes)):
            first = segment.before(number, low)
            if first < segment.before(number, high):
                parts[number] = (first, next(found))
        at = low
        while at < high:
            chunk, skip = divmod(at, segment.stripe_size)
            number = chunk % len(segment.stripes)
            length = min(segment.stripe_size - skip, high - at)
            first, data = parts[number]
            begin = segment.before(number, at) - first
            whole += data[begin : begin + length]
            at += length
    return bytes(whole)
