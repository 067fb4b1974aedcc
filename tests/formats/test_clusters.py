"""Rank and select over a disk's clusters, against a list of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imgfs.extents import ExtentListBuilder, Flags
from imgfs.formats.layout import About, Clusters

SIZE = 4


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12), st.data())
def test_clusters(runs: list[tuple[int, bool]], data: st.DataObject) -> None:
    builder = ExtentListBuilder()
    disk = b""
    for length, is_zero in runs:
        builder.append(builder.end + length, Flags.ZERO if is_zero else Flags.DATA)
        disk += (b"\0" if is_zero else b"x") * length
    clusters = Clusters(builder.finish(len(disk)), SIZE)
    held = [i for i in range(-(-len(disk) // SIZE)) if b"x" in disk[i * SIZE : (i + 1) * SIZE]]
    assert (clusters.total, clusters.count) == (-(-len(disk) // SIZE), len(held))
    first = data.draw(st.integers(0, clusters.total))
    end = data.draw(st.integers(first, clusters.total))
    assert clusters.rank(first) == sum(c < first for c in held)
    found = [(c, rank + c - a) for a, b, rank in clusters.runs(first, end) for c in range(a, b)]
    assert found == [(c, rank) for rank, c in enumerate(held) if first <= c < end]
    ranks = [
        (c, rank + c - a) for a, b, rank in clusters.runs_by_rank(first, end) for c in range(a, b)
    ]
    assert ranks == [(c, rank) for rank, c in enumerate(held) if first <= rank < end]


def test_ids_are_the_disks_own() -> None:
    one, other = (About("a.vdi", identity, 0) for identity in ("stat:1", "stat:2"))
    assert one.unique("uuid") == one.unique("uuid")
    assert len({one.unique("uuid"), one.unique("cid"), other.unique("uuid")}) == 3
