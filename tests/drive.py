"""Runs sans-IO code over bytes, and puts a disk together from its pieces, with nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from imgfs.formats.codecs import decode
from imgfs.formats.disk import Disk
from imgfs.pieces import Coded, Derived, Kind, PieceList
from imgfs.steps import MOST_BYTES, Opened, OpenFile, Steps

T = TypeVar("T")
Bytes = bytes | bytearray | Path


def pread(file: Bytes, offset: int, length: int) -> bytes:
    if not isinstance(file, Path):
        return bytes(file[offset : offset + length])
    fd = os.open(file, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def size_of(file: Bytes) -> int:
    return file.stat().st_size if isinstance(file, Path) else len(file)


class Files:
    """The files of one image: number 0 is the image, others may be opened by their names.

    `reads` counts batches, `bytes_read` what was asked for.
    """

    def __init__(self, first: Bytes, others: Mapping[str, Bytes] | None = None) -> None:
        self.opened = [first]
        self._others = others or {}
        self.reads = 0
        self.bytes_read = 0

    def run(self, steps: Steps[T]) -> T:
        """To its end.  Raises what it raises, and KeyError for a file that there is not."""
        answer: object = None
        while True:
            try:
                need = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(need, OpenFile):
                self.opened.append(self._others[need.name])
                answer = Opened(len(self.opened) - 1, size_of(self.opened[-1]))
                continue
            assert need, "an empty batch is no progress"
            assert all(r.length > 0 and r.offset >= 0 for r in need), need
            asked = sum(r.length for r in need)
            assert asked <= MOST_BYTES, asked
            self.reads += 1
            self.bytes_read += asked
            answer = [pread(self.opened[r.file], r.offset, r.length) for r in need]

    def content(
        self,
        pieces: PieceList,
        offset: int,
        length: int,
        below: Callable[[int, int], bytes] | None = None,
    ) -> bytes:
        """What the pieces say that `[offset, offset + length)` holds; `below(offset, length)` gives
        what is not said, else that is zero."""
        found = bytearray()
        for piece in pieces.between(offset, offset + length):
            size = piece.end - piece.start
            if piece.kind == Kind.DATA:
                part = pread(self.opened[piece.file], piece.offset, size)
                assert len(part) == size, f"{piece} is not inside of its file"
            elif piece.kind == Kind.CODED:
                assert isinstance(piece.detail, Coded)
                coded = pread(self.opened[piece.file], piece.offset, piece.detail.length)
                unit = decode(
                    piece.detail.codec,
                    coded,
                    piece.detail.unit,
                    str(piece),
                    sector=piece.detail.sector,
                )
                part = unit[piece.detail.skip : piece.detail.skip + size]
            elif piece.kind == Kind.DERIVED:
                assert isinstance(piece.detail, Derived)
                skip = piece.detail.skip
                first, last = piece.detail.needs(skip, skip + size)
                used = pread(self.opened[piece.file], first, last - first)
                assert len(used) == last - first, piece
                part = piece.detail.make(used, skip, skip + size)
            elif piece.kind == Kind.LITERAL:
                assert isinstance(piece.detail, bytes)
                part = piece.detail
            elif piece.kind == Kind.BELOW and below is not None:
                part = below(piece.start, size)
            else:
                part = bytes(size)
            assert len(part) == size, piece
            found += part
        return bytes(found)

    def read(
        self,
        disk: Disk,
        offset: int,
        length: int,
        below: Callable[[int, int], bytes] | None = None,
    ) -> bytes:
        """The disk's bytes."""
        found = b""
        while len(found) < length:
            at = offset + len(found)
            pieces = self.run(disk.map(at, length - len(found)))
            assert 0 <= pieces.start <= at < pieces.end <= disk.size
            found += self.content(pieces, at, min(pieces.end, offset + length) - at, below)
        return found
