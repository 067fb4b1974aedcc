"""What steps are given, whatever the driver has."""

from __future__ import annotations

import pytest

from imgfs.image import Buffer
from imgfs.steps import Read, read, read_all


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
