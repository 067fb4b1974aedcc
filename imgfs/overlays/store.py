"""The snapshots of one base: their names, and the layers that they are made of."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pwd
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from imgfs.errors import (
    AlreadyThere,
    Busy,
    CorruptSnapshot,
    LayerHeld,
    NotEmpty,
    OtherVersion,
    SnapshotNotFound,
    SourceChanged,
)
from imgfs.overlays import basefile
from imgfs.overlays.base import Base as Base
from imgfs.overlays.base import base_of as base_of
from imgfs.overlays.base import difference, load_base, not_ours
from imgfs.overlays.layer import (
    Layer,
    layer_files,
    make_layer,
    open_layer,
    replace_file,
    stored_bytes,
)
from imgfs.overlays.locks import LayerLock
from imgfs.overlays.places import Place, make_directories, sync_directory
from imgfs.overlays.reading import open_to_read, share
from imgfs.overlays.records import Records, Snapshot, SnapshotPath
from imgfs.overlays.records import decode as decode_records
from imgfs.overlays.records import encode as encode_records
from imgfs.overlays.spare import give_up_spare, keep_spare
from imgfs.overlays.times import changed_ns


def state_root() -> Path:
    """$STATE_DIRECTORY (systemd's), $XDG_STATE_HOME/imgfs or ~/.local/state/imgfs; not made yet."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    return Path(os.environ.get("XDG_STATE_HOME") or f"{home}/.local/state") / "imgfs"


class SnapshotStore:
    """All methods wait for the disk, and hold the directory's lock for as long as they run.

    They raise CorruptSnapshot for what is damaged, StateGone when the directory is not the one any
    more in which there were snapshots, and OSError.
    """

    def __init__(self, url: str, root: Path | None = None) -> None:
        """Of the base that is shown as `url`; nothing is made before there is a snapshot."""
        digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        name = url.rstrip("/").rpartition("/")[2]
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
        self.url = url
        self.directory = (root or state_root()) / f"{plain[:80]}-{digest}"
        self._read: tuple[tuple[int, ...], Records] | None = None  # and of which file
        self._place = Place(self.directory)
        self._had_any = False  # when this process looked last

    def check_place(self) -> None:
        """Raises StateGone, and OSError."""
        self._place.check(counts=self._had_any)

    def check_version(self) -> None:
        """Raises OtherVersion when another imgfs keeps its snapshots there."""
        try:
            self.base()
        except OtherVersion:
            raise
        except CorruptSnapshot:
            pass  # who uses a snapshot is told

    def base(self) -> Base | None:
        """What was recorded of it; None while it has no snapshot."""
        self.check_place()
        try:
            found = load_base(self.directory / "base")
        except FileNotFoundError:
            return None
        if found.url != self.url:
            raise CorruptSnapshot(not_ours(self.directory, found.url))
        return found

    def check_base(self, base: Base) -> None:
        """Raises SourceChanged when the snapshots are of another state of it.

        Raises CorruptSnapshot when there are some, and nothing says what they are of.
        """
        known = self.base()
        if known is None and self.has_any():
            raise CorruptSnapshot(
                f"{self.directory / 'base'}: is missing, so nothing tells whether its snapshots "
                "fit what is there now; bring the file back, or delete them"
            )
        if known is not None and known != base and self.has_any():
            raise SourceChanged(
                f"{self.url}: is not what its snapshots were taken of (in {self.directory}): "
                f"{difference(known, base)}; bring it back, or delete them"
            )

    def pin(self, base: Base) -> None:
        """From now on the snapshots are of this: our own write has made it."""
        with self.locked():
            basefile.save(self.directory / "base", asdict(base))

    def records(self) -> Records:
        self.check_place()
        try:
            with (self.directory / "snapshots").open("rb") as file:
                found = os.fstat(file.fileno())
                state = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
                if self._read is not None and self._read[0] == state:
                    return self._read[1]
                content = file.read()
        except FileNotFoundError:
            if (self.directory / "base").exists():
                raise CorruptSnapshot(f"{self.directory / 'snapshots'}: is missing") from None
            self._had_any = False
            return Records()
        self._had_any = True
        records = decode_records(content, str(self.directory / "snapshots"), self.url)
        self._read = state, records
        return records

    def state(self) -> tuple[int, int] | None:
        """Another one whenever what there is has changed; None: there is nothing."""
        try:
            found = (self.directory / "snapshots").stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def snapshots(self) -> list[Snapshot]:
        """By their names; without those whose records are damaged."""
        return list(self.records().snapshots)

    def damage(self) -> str | None:
        """What is wrong with the records, in a line."""
        records = self.records()
        if records.are_whole:
            return None
        return f"{self.directory / 'snapshots'}: {records.what_is_wrong()}"

    def get(self, path: SnapshotPath) -> Snapshot:
        """Raises SnapshotNotFound, and CorruptSnapshot when it may be one of the damaged ones."""
        return self._find(path, self.records())

    def _find(self, path: SnapshotPath, records: Records) -> Snapshot:
        for each in records.snapshots:
            if each.path == path:
                return each
        if not records.are_whole:
            raise CorruptSnapshot(f"{self.directory / 'snapshots'}: {records.what_is_wrong()}")
        raise SnapshotNotFound(f"{self.url}: has no snapshot {'/'.join(path)}")

    def size_of(self, path: SnapshotPath) -> int:
        """Bytes of its disk.  Raises SnapshotNotFound."""
        layers = self.open_layers(path, writable=False)
        try:
            return layers[0].size
        finally:
            for layer in layers:
                layer.close()

    def own_bytes(self, snapshot: Snapshot) -> int:
        """What it takes on disk; what snapshots of it stand on too is its own, and not theirs.

        So each layer counts for one snapshot.
        """
        others = {
            name
            for each in self.snapshots()
            if each.path != snapshot.path and snapshot.path not in _above(each.path)
            for name in each.layers
        }
        total = 0
        for name in snapshot.layers:
            if name not in others:
                with contextlib.suppress(OSError):
                    total += stored_bytes(self.layer_path(name))
        return total

    def has_any(self) -> bool:
        records = self.records()
        return bool(records.snapshots) or not records.are_whole

    def create(
        self,
        path: SnapshotPath,
        base: Base,
        size: int,
        top: Layer | None = None,
        mtime_ns: int | None = None,
    ) -> Layer | None:
        """Take one: of the base, or of the snapshot whose snapshots/ it is in.

        `size` is of the disk now, `mtime_ns` of the base.  `top` is the parent's top layer where
        the caller has it open for writing, and has committed all; if a layer is returned he must
        write that from now on.
        Raises AlreadyThere, SnapshotNotFound, SourceChanged, Busy.
        """
        with self.locked():
            self.check_base(base)
            records = self.records()
            known = {each.path: each for each in records.snapshots}
            if path in known:
                raise AlreadyThere(f"{self.url}: has a snapshot {'/'.join(path)} already")
            if self.base() != base:
                # Whoever made it may have been killed before its name was durable.
                for directory in (self.directory, *list(self.directory.parents)[:2]):
                    sync_directory(directory)
                self._save_records(records)  # a base without this has lost it
                basefile.save(self.directory / "base", asdict(base))
            self._sweep(records)
            below: tuple[str, ...] = ()
            fresh: Layer | None = None
            if path[:-1]:
                parent = self._find(path[:-1], records)
                mtime_ns = self._changed_ns(parent, top)
            made = [self._new_layer(size, mtime_ns)]
            if path[:-1]:
                if top is None or not top.is_empty:
                    fresh, parent = self._freeze(parent, size, top)
                    known[parent.path] = parent
                    made.append(parent.layers[0])
                below = parent.layers[1:]
            known[path] = Snapshot(path, (made[0], *below), int(time.time()))
            self._save_frozen(records.with_snapshots(known.values()), made, fresh, top)
            keep_spare(self.directory)
            return fresh

    def freeze(self, path: SnapshotPath, size: int, top: Layer) -> Layer:
        """Put a new top layer over what the caller writes, and has committed; it is his to write.

        What was the top stays as it is from now on.
        """
        with self.locked():
            records = self.records()
            known = {each.path: each for each in records.snapshots}
            fresh, snapshot = self._freeze(self._find(path, records), size, top)
            assert fresh is not None
            known[path] = snapshot
            records = records.with_snapshots(known.values())
            self._save_frozen(records, snapshot.layers[:1], fresh, top)
            return fresh

    def _freeze(
        self, snapshot: Snapshot, size: int, top: Layer | None
    ) -> tuple[Layer | None, Snapshot]:
        if top is None:
            # Nobody may be writing what is to stay as it is.
            with self._free(snapshot.path):
                LayerLock(self.layer_path(snapshot.layers[0]), writes=False).close()
        name = self._new_layer(size, self._changed_ns(snapshot, top))
        fresh = None if top is None else open_layer(self.layer_path(name), writable=True)
        return fresh, replace(snapshot, layers=(name, *snapshot.layers))

    def _save_frozen(
        self, records: Records, made: Iterable[str], fresh: Layer | None, top: Layer | None
    ) -> None:
        try:
            self._save_records(records, made)
        except BaseException:
            if fresh is not None:
                fresh.close()
            raise
        if fresh is not None and top is not None:
            top.mark_closed()
            top.lock.only_read()
            share(top)

    def delete(self, path: SnapshotPath, top: Layer | None = None) -> None:
        """Raises SnapshotNotFound, NotEmpty when it has snapshots, Busy when it is open.

        `top` is its top layer where the caller has it open for writing.
        """
        with self.locked():
            self.check_version()
            records = self.records()
            snapshot = self._find(path, records)
            known = [each for each in records.snapshots if each is not snapshot]
            self._check_childless(path, records)
            if top is None:
                with contextlib.suppress(FileNotFoundError), self._free(path):
                    LayerLock(self.layer_path(snapshot.layers[0]), writes=True).close()
            self._remove_others(records.with_snapshots(known))

    def check_childless(self, path: SnapshotPath) -> None:
        """Raises NotEmpty when it has snapshots, without which it cannot be deleted.

        The answer stays true for as long as the caller has it open for writing.
        """
        with self.locked():
            self._check_childless(path, self.records())

    def _check_childless(self, path: SnapshotPath, records: Records) -> None:
        below = [each.path for each in records.snapshots if path in _above(each.path)]
        if below:
            names = ", ".join("/".join(each) for each in reversed(below))
            raise NotEmpty(
                f"{self.url}: {'/'.join(path)} has snapshots itself; delete {names} first"
            )

    def delete_damaged(self) -> int:
        """Give up the snapshots whose records are damaged; returns how many those were."""
        with self.locked():
            records = self.records()
            self._remove_others(Records(records.snapshots))
            return len(records.damaged) + records.missing

    def _remove_others(self, records: Records) -> None:
        """These are all that is left."""
        if records == Records():
            # The next one may be of another state of the base.  Only in this order can what a
            # crash leaves be deleted again; and but for the first step none of it needs space.
            with contextlib.suppress(OSError):
                self._save_records(records)
            (self.directory / "base").unlink(missing_ok=True)
            sync_directory(self.directory)
            (self.directory / "snapshots").unlink(missing_ok=True)
            give_up_spare(self.directory)
            self._had_any = False
            sync_directory(self.directory)
        else:
            try:
                self._save_records(records)
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # Whoever deletes wants room: there is some that was kept for that.
                give_up_spare(self.directory)
                self._save_records(records)
        self._sweep(records)
        keep_spare(self.directory)

    def rename(self, path: SnapshotPath, name: str) -> None:
        """Raises SnapshotNotFound and AlreadyThere."""
        with self.locked():
            self.check_version()
            records = self.records()
            self._find(path, records)
            fresh = (*path[:-1], name)
            if fresh != path and any(each.path == fresh for each in records.snapshots):
                raise AlreadyThere(f"{self.url}: has a snapshot {'/'.join(fresh)} already")
            self._save_records(
                records.with_snapshots(
                    replace(each, path=(*fresh, *each.path[len(path) :]))
                    if each.path[: len(path)] == path
                    else each
                    for each in records.snapshots
                )
            )

    def join(self, upper: str, lower: str, kept: str) -> bool:
        """The kept one has all that the two have: it takes their place in all snapshots.

        False, and nothing is done, when there are none, or one that has not both.
        """
        with self.locked():
            records = self.records()
            joined = []
            for each in records.snapshots:
                layers = list(each.layers)
                if lower in layers:
                    at = layers.index(lower) - 1
                    if at < 1 or layers[at] != upper:
                        return False
                    layers[at : at + 2] = [kept]
                joined.append(replace(each, layers=tuple(layers)))
            if not records.are_whole or tuple(joined) == records.snapshots:
                return False
            records = records.with_snapshots(joined)
            self._save_records(records)
            self._sweep(records)
            return True

    def open_layers(self, path: SnapshotPath, *, writable: bool) -> list[Layer]:
        """All of the snapshot's layers, from the top down; with `writable` the first one is for us
        alone, and without it nobody may write it.

        Raises SnapshotNotFound, Busy.
        """
        found: list[Layer] = []
        with self.locked(), self._free(path):
            try:
                for index, name in enumerate(self.get(path).layers):
                    layer_path = self.layer_path(name)
                    if writable and index == 0:
                        found.append(open_layer(layer_path, writable=True))
                    else:
                        found.append(open_to_read(layer_path))
            except BaseException:
                for layer in found:
                    layer.close()
                raise
        return found

    @contextlib.contextmanager
    def _free(self, path: SnapshotPath) -> Iterator[None]:
        """Who has a layer open has the snapshot in use, which is what a person knows by name."""
        try:
            yield
        except LayerHeld as exc:
            raise Busy(
                f"{self.url}: snapshot {'/'.join(path)} is open for {exc.what} in {exc.who}; "
                "unmount it, or end that, first"
            ) from None

    def layer_path(self, name: str) -> Path:
        return self.directory / "layers" / name

    def _new_layer(self, size: int, mtime_ns: int | None) -> str:
        """To be forced out by `_save_records`."""
        name = secrets.token_hex(8)
        make_layer(self.layer_path(name), size, mtime_ns)
        return name

    def _changed_ns(self, snapshot: Snapshot, top: Layer | None) -> int:
        """The mtime of its disk; `top` is its top layer, if the caller has that open."""
        return top.times()[0] if top else changed_ns(self.layer_path(snapshot.layers[0]))

    def _sweep(self, records: Records) -> None:
        """Remove the layers that are nobody's: a crash left them, or the last one is gone."""
        if not records.are_whole:
            return  # nobody can tell whose they are
        used = {name for snapshot in records.snapshots for name in snapshot.layers}
        for path in (self.directory / "layers").iterdir():
            if path.name not in used:
                shutil.rmtree(path, ignore_errors=True)

    def _save_records(self, records: Records, made: Iterable[str] = ()) -> None:
        """`made` are the layers that nothing has named before."""
        others = [file for name in made for file in layer_files(self.layer_path(name))]
        if others:
            others.append(self.directory / "layers")
        replace_file(self.directory / "snapshots", encode_records(records, self.url), others)
        self._had_any = True

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes what there is, nor opens any of it."""
        self.check_place()
        make_directories(self.directory / "layers")
        self.check_place()  # from now on it is this one
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _above(path: SnapshotPath) -> list[SnapshotPath]:
    """The snapshots in whose snapshots/ it is."""
    return [path[:depth] for depth in range(1, len(path))]


def stores(root: Path | None = None) -> list[SnapshotStore]:
    """All that there are, by what they are of; see also `unreadable`.  Raises nothing."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted((root or state_root()).iterdir()):
            with contextlib.suppress(OSError, CorruptSnapshot):
                store = SnapshotStore(load_base(path / "base").url, path.parent)
                if store.directory == path:
                    found.append(store)
    return found


def unreadable(root: Path | None = None) -> list[str]:
    """Why some are not in `stores`, a line each.  Raises nothing."""
    root = root or state_root()
    why = list(basefile.unreadable(root))
    with contextlib.suppress(OSError):
        for path in sorted(root.iterdir()):
            with contextlib.suppress(OSError, CorruptSnapshot):
                url = load_base(path / "base").url
                if SnapshotStore(url, root).directory != path:
                    why.append(not_ours(path, url))
    return why
