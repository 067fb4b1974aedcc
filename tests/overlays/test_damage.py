"""Damage to what is kept beside snapshots' layers: what it hits is refused by the file's name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.checksums import encode_document, seed_of
from imgfs.errors import CorruptSnapshot, ImgfsError, OtherVersion, SnapshotNotFound, SourceChanged
from imgfs.overlays.commit import committing
from imgfs.overlays.rawpins import is_pinned_raw, pin_raw, unpin_raw
from imgfs.overlays.records import Snapshot
from imgfs.overlays.store import SnapshotStore, state_root, stores, unreadable
from tests.damage import LONG, all_of, swapped

from .test_store import BASE, SIZE, URL, names

pytestmark = pytest.mark.timeout(3600 if LONG else 300)
PATHS = [("a",), ("a", "b"), ("c",), ("ü\udc80", "x" * 200)]


class Interrupted(Exception):
    pass


def filled(root: Path, url: str = URL) -> SnapshotStore:
    store = SnapshotStore(url, root)
    base = BASE.__class__(url, SIZE, "raw", "stat", "1:2:3")
    for path in (*PATHS[:3], PATHS[3][:1], PATHS[3]):
        store.create(path, base, SIZE)
    return store


def layers(store: SnapshotStore) -> set[str]:
    return {path.name for path in (store.directory / "layers").iterdir()}


def test_the_list_of_snapshots(tmp_path: Path) -> None:
    store, other = filled(tmp_path), filled(tmp_path, "ssh://host/vm/other.img")
    file = store.directory / "snapshots"
    good, theirs = file.read_bytes(), (other.directory / "snapshots").read_bytes()
    known: dict[tuple[str, ...], Snapshot] = {each.path: each for each in store.snapshots()}
    there = layers(store)
    for damaged in all_of(good, theirs):
        file.write_bytes(damaged)
        fresh = SnapshotStore(URL, tmp_path)
        found = {each.path: each for each in fresh.snapshots()}
        assert found.items() <= known.items()
        damage = fresh.damage()
        if found != known:
            assert damage is not None and damage.startswith(f"{file}: ")
            (missing, *_) = known.keys() - found.keys()
            with pytest.raises(CorruptSnapshot, match="snapshots: "):
                fresh.get(missing)
        if damage is not None:
            with pytest.raises((CorruptSnapshot, SnapshotNotFound)):
                fresh.get(("none",))
    # Nobody sweeps what a damaged record may name; not even when all of the list is another's.
    for damaged in (theirs, b"", good[: len(good) // 2], b"\n".join(good.split(b"\n")[:2])):
        file.write_bytes(damaged)
        fresh = SnapshotStore(URL, tmp_path)
        fresh.create(("new",), BASE, SIZE)
        fresh.delete(("new",))
        assert layers(store) >= there


def test_lines_of_the_list(tmp_path: Path) -> None:
    """In another order they say the same; two of one snapshot say nothing."""
    store = filled(tmp_path)
    file = store.directory / "snapshots"
    header, *lines = file.read_bytes().splitlines()
    known = store.snapshots()
    for order in (
        [*lines[::-1], header],
        [lines[0], header, *lines[1:]],
        [header, *lines, lines[0]],
    ):
        file.write_bytes(b"\n".join(order) + b"\n")
        fresh = SnapshotStore(URL, tmp_path)
        assert (fresh.snapshots(), fresh.damage()) == (known, None)
    file.write_bytes(b"\n".join([header, lines[0], lines[0], *lines[2:]]))
    fresh = SnapshotStore(URL, tmp_path)
    assert len(fresh.snapshots()) == len(known) - 1
    assert "1 lost" in (fresh.damage() or "")
    file.write_bytes(b"\n".join([header, *lines]) + b"\n")
    store.rename(("c",), "d")
    renamed = next(line for line in file.read_bytes().splitlines() if b'["d"]' in line)
    store.rename(("d",), "a2")
    now = file.read_bytes()
    # A line of an earlier state is of layers that are named already, or gone: it is one too many.
    file.write_bytes(now + renamed + b"\n")
    assert SnapshotStore(URL, tmp_path).damage() is not None


def test_the_base(tmp_path: Path) -> None:
    store, other = filled(tmp_path), filled(tmp_path, "ssh://host/vm/other.img")
    file = store.directory / "base"
    good, theirs = file.read_bytes(), (other.directory / "base").read_bytes()
    for damaged in all_of(good, theirs):
        file.write_bytes(damaged)
        fresh = SnapshotStore(URL, tmp_path)
        failed, found = unreadable(tmp_path), stores(tmp_path)
        try:
            assert fresh.base() == BASE
            fresh.check_base(BASE)
            assert [each.url for each in found] == [URL, other.url] and not failed
        except CorruptSnapshot as exc:
            assert str(exc).startswith(f"{file}: ")
            assert [each.url for each in found] == [other.url]
            assert len(failed) == 1 and failed[0].startswith(f"{file}: ")
            with pytest.raises(CorruptSnapshot):
                fresh.create(("new",), BASE, SIZE)
    file.unlink()
    assert unreadable(tmp_path) == [f"{file}: is missing; bring it back"]


def test_what_is_being_committed(tmp_path: Path) -> None:
    store, other = filled(tmp_path), filled(tmp_path, "ssh://host/vm/other.img")
    contents = []
    for each in (store, other):
        base = each.base()
        assert base is not None
        with pytest.raises(Interrupted), committing(each, ("a",), base):
            raise Interrupted
        contents.append((each.directory / "committing").read_bytes())
    file = store.directory / "committing"
    for damaged in all_of(*contents):
        file.write_bytes(damaged)
        try:
            with committing(store, ("a",), BASE):
                raise Interrupted
        except Interrupted:
            pass
        except CorruptSnapshot as exc:
            assert str(exc).startswith(f"{file}: is damaged: ")
        # Never another one, and never as if nothing had begun.
        with pytest.raises((CorruptSnapshot, SourceChanged)), committing(store, ("c",), BASE):
            raise Interrupted
    file.write_bytes(contents[0])
    with committing(store, ("a",), BASE):
        pass
    assert not file.exists()


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Both files of a pin."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("disk", "other"):
        pin_raw(f"/{name}.img")
    found = sorted(state_root().glob("raw*/*"), key=lambda path: path.name)
    assert len(found) == 4
    unpin_raw("/other.img")
    ours = [path for path in found if path.exists()]
    pin_raw("/other.img")
    assert len(ours) == 2
    return ours


def test_a_pin_stays_whatever_becomes_of_it(
    pinned: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    good = pinned[0].read_bytes()
    theirs = next(path for path in pinned[0].parent.iterdir() if path != pinned[0]).read_bytes()
    assert good != theirs
    for damaged in all_of(good, theirs):
        for path in pinned:
            path.write_bytes(damaged)
            assert is_pinned_raw("/disk.img")
        pin_raw("/disk.img")  # as it is the next time the source is written
        assert [path.read_bytes().strip() for path in pinned] == [good.strip()] * 2


def test_a_pin_that_is_gone_once(pinned: list[Path]) -> None:
    for path in pinned:
        path.unlink()
        assert is_pinned_raw("/disk.img")
        for each in path.parent.iterdir():
            each.unlink()  # the others', too
        path.parent.rmdir()
        assert is_pinned_raw("/disk.img") and is_pinned_raw("/other.img")
        pin_raw("/disk.img")
        pin_raw("/other.img")
    assert all(path.exists() for path in pinned)
    unpin_raw("/disk.img")
    assert not is_pinned_raw("/disk.img") and is_pinned_raw("/other.img")


def test_what_is_said_of_a_damaged_pin(
    pinned: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    pinned[0].write_bytes(b"x")
    assert is_pinned_raw("/disk.img")
    assert f"{pinned[0]}: is damaged" in caplog.text and "stays raw" in caplog.text


def test_a_pin_of_version_1(pinned: list[Path]) -> None:
    pinned[1].unlink()
    pinned[0].write_bytes(b"")
    assert is_pinned_raw("/disk.img")


Use = Callable[[SnapshotStore], object]


def test_other_versions(tmp_path: Path, pinned: list[Path]) -> None:
    """It says so, in one way, whatever file it is."""
    store = filled(tmp_path)
    base = BASE
    uses: dict[str, Use] = {
        "base": lambda each: each.check_base(base),
        "committing": lambda each: committing(each, ("a",), base).__enter__(),
    }
    for name, use in uses.items():
        path = store.directory / name
        owner = URL if name == "committing" else ""
        path.write_bytes(encode_document(9, {"later": 1}, seed_of(name, owner)))
        with pytest.raises(OtherVersion, match=f"^{path}: version 9 is of another imgfs, "):
            use(store)
    pinned[0].write_bytes(encode_document(9, {"format": "vdi"}, seed_of("pin", pinned[0].name)))
    with pytest.raises(ImgfsError, match=f"^{pinned[0]}: version 9 is of another imgfs"):
        is_pinned_raw("/disk.img")
    assert names(store) == ["a", "a/b", "c", "ü\udc80", "ü\udc80/" + "x" * 200]


def test_swapped_parts_are_never_a_list(tmp_path: Path) -> None:
    """Of a list of many blocks, within the file and with another's."""
    store, other = (SnapshotStore(url, tmp_path) for url in (URL, f"{URL}2"))
    for each in (store, other):
        base = BASE.__class__(each.url, SIZE, "raw", "stat", "1:2:3")
        for number in range(3):
            each.create((f"{number}" * 250,), base, SIZE)
        records = each.records()
        many = [
            Snapshot((f"{name:03}" * 80,), records.snapshots[name % 3].layers, name)
            for name in range(700)
        ]
        each._save_records(records.with_snapshots(many))
    files = [each.directory / "snapshots" for each in (store, other)]
    good, theirs = (file.read_bytes() for file in files)
    known = {each.path: each for each in store.snapshots()}
    assert len(good) > 3 * (64 << 10)
    for length in (4096, 64 << 10):
        for first, second in ((0, length), (length, 2 * length), (0, 2 * length)):
            inside = swapped(good, first, second, length)
            mixed = good[:first] + theirs[first : first + length] + good[first + length :]
            for damaged in (inside, mixed):
                files[0].write_bytes(damaged)
                fresh = SnapshotStore(URL, tmp_path)
                assert {each.path: each for each in fresh.snapshots()}.items() <= known.items()
                assert str(files[0]) in (fresh.damage() or "")
