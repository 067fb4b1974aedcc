"""What steps are given, and steps that go on together: the same answers, in as few batches as the
longest of them needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.image import Buffer
from imgfs.steps import MOST_BYTES, Opened, Read, Steps, open_file, read, read_all, together
from tests.drive import Files

FILE = bytes(range(256)) * 16
Batches = list[list[tuple[int, int]]]
BATCHES = st.lists(
    st.lists(st.tuples(st.integers(0, 4200), st.integers(1, 96)), max_size=4), max_size=5
)


def walk(batches: Batches) -> Steps[list[bytes]]:
    found = []
    for batch in batches:
        found += yield from read_all([Read(offset, length) for offset, length in batch])
    return found


@given(st.lists(BATCHES, max_size=12), st.integers(1, 12))
def test_answers_are_the_same_and_in_order(jobs: list[Batches], at_once: int) -> None:
    files = Files(FILE)
    alone = [Files(FILE).run(walk(batches)) for batches in jobs]
    assert files.run(together([walk(batches) for batches in jobs], at_once)) == alone
    if at_once >= len(jobs):
        assert files.reads == max((sum(map(bool, batches)) for batches in jobs), default=0)


def test_it_may_be_nested() -> None:
    files = Files(FILE)
    inner = [together([walk([[(n, 1)], [(n + 1, 1)]]) for n in range(3)]) for _ in range(3)]
    found = files.run(together(inner))
    assert found == [[[FILE[n : n + 1], FILE[n + 1 : n + 2]] for n in range(3)]] * 3
    assert files.reads == 2


def test_a_batch_is_not_larger_than_may_be() -> None:
    def large() -> Steps[int]:
        return len((yield from read(0, MOST_BYTES // 3)))

    files = Files(b"")
    assert files.run(together([large() for _ in range(7)])) == [0] * 7  # Files checks each batch
    assert files.reads == 3


def test_files_are_opened_one_by_one() -> None:
    def other(name: str) -> Steps[bytes]:
        opened = yield from open_file(name)
        return (yield from read(0, opened.size, opened.file))

    names = {"a": b"first", "b": b"second"}
    found = Files(FILE, names).run(together([other("a"), walk([[(0, 2)]]), other("b")]))
    assert found == [b"first", [FILE[:2]], b"second"]


def test_a_failed_batch_is_raised_in_all_of_it() -> None:
    seen = []

    def patient(name: str) -> Steps[str]:
        try:
            yield from read(0, 1)
        except OSError:
            seen.append(name)
        return name

    steps = together([patient("a"), patient("b")])
    steps.send(None)
    with pytest.raises(StopIteration) as end:
        steps.throw(OSError("no"))
    assert end.value.value == ["a", "b"] == seen


def test_what_a_job_raises_ends_the_others() -> None:
    ended = []

    def other() -> Steps[None]:
        try:
            yield from read(0, 1)
            yield from read(0, 1)
        finally:
            ended.append(True)

    def failing() -> Steps[None]:
        yield from read(0, 1)
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        Files(FILE).run(together([other(), failing(), other()]))
    assert ended == [True, True]


def test_files_are_opened_one_after_the_other() -> None:
    files = Files(FILE, {"x": b"1", "y": b"22"})
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
