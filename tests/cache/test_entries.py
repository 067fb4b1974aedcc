"""The entries of a cache's blocks: no damage of one makes it say something else."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from imgfs.cache.entries import NOTHING, SIZE, Codec, decode, encode
from imgfs.checksums import MASK

keys = st.integers(0, MASK)
blocks = st.integers(0, 1 << 47)
contents = st.binary(min_size=1, max_size=300)


@given(keys, keys, blocks, blocks)
def test_zeroes_are_claimed_of_one_block_in_one_directory(
    key: int, other: int, block: int, another: int
) -> None:
    entry = Codec(key).zero_entry(block)
    assert 0 < entry <= MASK
    assert (Codec(key).zero_entry(another) == entry) == (another == block)
    assert (Codec(other).zero_entry(block) == entry) == (other == key)
    # Far from what says nothing, however few bits are damaged.
    assert 8 < entry.bit_count() < 56


@given(keys, blocks, blocks, contents, contents)
def test_an_entry_is_of_its_block_and_its_bytes(
    key: int, block: int, another: int, data: bytes, others: bytes
) -> None:
    codec = Codec(key)
    entry = codec.entry_of(block, data)
    assert entry not in (NOTHING, codec.zero_entry(block), codec.zero_entry(another))
    assert (codec.entry_of(another, data) == entry) == (another == block)
    assert (codec.entry_of(block, others) == entry) == (data == others)


@given(keys, blocks, st.integers(0, 63), contents)
def test_a_flipped_bit(key: int, block: int, bit: int, data: bytes) -> None:
    codec = Codec(key)
    claims = (codec.zero_entry(block), codec.entry_of(block, data), codec.entry_of(block, b""))
    for entry in (NOTHING, *claims):
        assert entry ^ 1 << bit not in claims


@given(keys, st.lists(blocks, min_size=1), st.integers(1, SIZE - 1))
def test_parts_of_two_entries(key: int, numbers: list[int], cut: int) -> None:
    """As a crash leaves them, or blocks that were swapped at any place."""
    codec = Codec(key)
    claims = {codec.zero_entry(block) for block in numbers}
    old = encode(array("Q", [NOTHING]))
    for claim in claims:
        new = encode(array("Q", [claim]))
        for torn in (new[:cut] + old[cut:], old[:cut] + new[cut:]):
            assert torn == new or decode(torn)[0] not in claims


@given(st.lists(st.integers(0, MASK)))
def test_on_disk(entries: list[int]) -> None:
    assert encode(array("Q", entries)) == b"".join(each.to_bytes(8, "little") for each in entries)
    assert decode(encode(array("Q", entries))).tolist() == entries
