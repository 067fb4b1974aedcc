"""Damage to the list of snapshots: those that it hits are refused, and nothing of them is lost."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.checksums import encode_line, seed_of
from imgfs.errors import AlreadyThere, CorruptSnapshot, OtherVersion, SnapshotNotFound
from imgfs.overlays.records import Records, Snapshot, decode, encode
from imgfs.overlays.store import SnapshotStore

from .test_store import BASE, SIZE, URL, close, names, opened, put

texts = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=5)
snapshots = st.builds(
    Snapshot,
    st.lists(texts, min_size=1, max_size=3).map(tuple),
    st.lists(st.text("0123456789abcdef", min_size=16, max_size=16), min_size=1).map(tuple),
    st.integers(0, 1 << 40),
)


@given(st.lists(snapshots, max_size=4, unique_by=lambda each: each.path))
def test_what_was_written_is_read(found: list[Snapshot]) -> None:
    records = Records().with_snapshots(found)
    assert decode(encode(records, URL), "snapshots", URL) == records
    assert records.are_whole


@given(st.lists(snapshots, min_size=1, max_size=3, unique_by=lambda each: each.path), st.data())
def test_damage_is_never_taken_for_none(found: list[Snapshot], data: st.DataObject) -> None:
    good = encode(Records().with_snapshots(found), URL)
    at = data.draw(st.integers(0, len(good) - 2))
    if data.draw(st.booleans()):
        damaged = good[:at]
    else:
        bit = 1 << data.draw(st.integers(0, 7))
        damaged = good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :]
    records = decode(damaged, "snapshots", URL)
    assert not records.are_whole
    assert set(records.snapshots) <= set(found)
    # It stays so, however often the file is written anew.
    again = decode(encode(records, URL), "snapshots", URL)
    assert (again.snapshots, again.damaged) == (records.snapshots, records.damaged)
    assert not again.are_whole


@pytest.mark.parametrize("version", [1, 3])
def test_a_version_that_is_not_known(version: int) -> None:
    text = b'{"version": %d, "records": 0}' % version
    line = b"%08x %s" % (zlib.crc32(text), text)
    if version > 1:
        line = encode_line(text, seed_of("snapshots", URL))
    with pytest.raises(OtherVersion, match=rf"^snapshots: version {version} is of another imgfs, "):
        decode(line + b"\n", "snapshots", URL)


@pytest.fixture
def damaged(tmp_path: Path) -> SnapshotStore:
    """Of a, a/b and c the first one's record is damaged; each has written its name."""
    store = SnapshotStore(URL, tmp_path)
    for path in (("a",), ("a", "b"), ("c",)):
        store.create(path, BASE, SIZE)
        layers = opened(store, *path)
        put(layers[0], 0, path[-1].encode())
        close(layers)
    file = store.directory / "snapshots"
    good = file.read_bytes()
    file.write_bytes(good.replace(b'["a"]', b'["A"]'))
    return store


def test_the_others_can_be_used(damaged: SnapshotStore) -> None:
    store, file = damaged, damaged.directory / "snapshots"
    layers = sorted((store.directory / "layers").iterdir())
    assert names(store) == ["a/b", "c"]
    assert store.has_any()
    assert str(file) in (store.damage() or "")
    for use in (lambda: store.get(("a",)), lambda: store.create(("a", "d"), BASE, SIZE)):
        with pytest.raises(CorruptSnapshot, match=r'snapshots: has damaged records .*"path"'):
            use()
    store.create(("e",), BASE, SIZE)
    store.rename(("e",), "f")
    store.delete(("f",))
    store.delete(("c",))
    close(opened(store, "a", "b"))
    assert names(store) == ["a/b"]
    assert set(layers) <= set((store.directory / "layers").iterdir())
    # When the record is as it was the snapshot is there again.
    file.write_bytes(file.read_bytes().replace(b'["A"]', b'["a"]'))
    assert store.damage() is None
    assert names(store) == ["a", "a/b"]
    close(opened(store, "a"))
    with pytest.raises(AlreadyThere):
        store.create(("a",), BASE, SIZE)


def test_the_damaged_ones_can_be_given_up(damaged: SnapshotStore) -> None:
    assert damaged.delete_damaged() == 1
    assert (damaged.damage(), names(damaged)) == (None, ["a/b", "c"])
    assert len(list((damaged.directory / "layers").iterdir())) == 3  # b's is on what was a's
    with pytest.raises(SnapshotNotFound):
        damaged.get(("a",))


def test_all_of_them_damaged(damaged: SnapshotStore) -> None:
    (damaged.directory / "snapshots").write_bytes(b"")
    assert (names(damaged), damaged.has_any()) == ([], True)
    with pytest.raises(CorruptSnapshot):
        damaged.get(("c",))
    layers = list((damaged.directory / "layers").iterdir())
    damaged.create(("new",), BASE, SIZE)
    damaged.delete(("new",))
    assert set(layers) <= set((damaged.directory / "layers").iterdir())
    damaged.delete_damaged()
    assert (damaged.base(), damaged.has_any()) == (None, False)
