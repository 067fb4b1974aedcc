"""Code that needs bytes but does no input: it says which, and is given them.

A `Steps[T]` is a generator that ends with a T.  In between it yields what it needs, a batch of
reads that may be done at once or a file to open, and is sent the answers; an answer that cannot be
had is raised inside of it.  Only the functions here yield; all others use `yield from`:

    def open_disk(size: int) -> Steps[Disk]:
        header = yield from read(0, 104)

File 0 is what it is about; `open_file` gives the numbers of others.  One driver does all
the reading (`imgfs.views.drive`); tests drive the same code over bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

from imgfs.image import Buffer

T = TypeVar("T")

MOST_BYTES = 64 << 20  # of all reads of one batch


class Read(NamedTuple):
    """A range of a file, in bytes."""

    offset: int
    length: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that another one names.  Whether the name may be followed is the driver's to say."""

    name: str


class Opened(NamedTuple):
    file: int
    size: int  #: bytes


Steps: TypeAlias = Generator[Sequence[Read] | OpenFile, Any, T]


def read(offset: int, length: int, file: int = 0) -> Steps[bytes]:
    """The bytes of the range; fewer where the file ends before it does."""
    (found,) = yield from read_all([Read(offset, length, file)])
    return found


def read_all(reads: Sequence[Read]) -> Steps[list[bytes]]:
    """As `read`, several at once; together they may ask for `MOST_BYTES`."""
    if not reads:
        return []
    found: list[Buffer] = yield reads
    return [bytes(part) for part in found]


def open_file(name: str) -> Steps[Opened]:
    """Raises what opening it raises, and UsageError where the name may not be followed."""
    opened: Opened = yield OpenFile(name)
    return opened


def together(several: Sequence[Steps[T]]) -> Steps[list[T]]:
    """All of them: what each needs next is read in one batch.  None may open a file, and what they
    ask for at once must be allowed together."""
    results: dict[int, T] = {}
    needs: dict[int, Sequence[Read]] = {}

    def go_on(index: int, answer: list[bytes] | None) -> None:
        try:
            need = several[index].send(answer)
        except StopIteration as end:
            results[index] = end.value
            needs.pop(index, None)
            return
        if isinstance(need, OpenFile):
            raise TypeError(f"a file opened beside others: {need.name!r}")
        needs[index] = need

    for index in range(len(several)):
        go_on(index, None)
    while needs:
        asked = list(needs.items())
        found = iter((yield from read_all([read for _, reads in asked for read in reads])))
        for index, reads in asked:
            go_on(index, [next(found) for _ in reads])
    return [results[index] for index in range(len(several))]
