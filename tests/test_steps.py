"""What steps are given, and steps that go on together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.image import Buffer
from imgfs.steps import Opened, Read, Steps, open_file, read, read_all, together
from tests.drive import Files

CONTENT = bytes(range(256))
Batches = list[list[tuple[int, int]]]
BATCHES = st.lists(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 9)), max_size=3), max_size=4
)


def reader(batches: Batches) -> Steps[list[bytes]]:
    found = []
    for batch in batches:
        found += yield from read_all([Read(offset, length) for offset, length in batch])
    return found


@given(st.lists(BATCHES, max_size=5))
def test_together(several: list[Batches]) -> None:
    files = Files(CONTENT)
    alone = [Files(CONTENT).run(reader(batches)) for batches in several]
    assert files.run(together([reader(batches) for batches in several])) == alone
    assert files.reads == max((sum(map(bool, batches)) for batches in several), default=0)


def test_files_are_opened_one_after_the_other() -> None:
    files = Files(CONTENT, {"x": b"1", "y": b"22"})
    opened = files.run(together([open_file("x"), open_file("y")]))
    assert opened == [Opened(1, 1), Opened(2, 2)]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_reads_are_bytes(kind: type[Buffer]) -> None:
    """A layer may answer with a buffer of its own, which format code could not parse."""
    steps = read(5, 3)
    assert next(steps) == [Read(5, 3)]
    with pytest.raises(StopIteration) as end:
        steps.send([kind(b"abc")])
    assert type(end.value.value) is bytes
    several = read_all([Read(0, 1), Read(1, 1)])
    next(several)
    with pytest.raises(StopIteration) as end:
        several.send([kind(b"a"), kind(b"b")])
    assert end.value.value == [b"a", b"b"]
    assert all(type(part) is bytes for part in end.value.value)
