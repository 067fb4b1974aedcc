"""The snapshots of one base: their names, and the layers that they are made of."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import secrets
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from imgfs.errors import (
    AlreadyThere,
    CorruptSnapshot,
    NotEmpty,
    NotPermitted,
    SnapshotNotFound,
    SourceChanged,
)
from imgfs.overlays.layer import (
    Layer,
    lock_layer,
    make_layer,
    open_layer,
    replace_file,
    sync_directory,
)
from imgfs.sources.base import Identity

VERSION = 1

#: A snapshot's name, behind the names of those whose snapshots/ it is in.
SnapshotPath = tuple[str, ...]


def state_root() -> Path:
    """$STATE_DIRECTORY (systemd's), $XDG_STATE_HOME/imgfs or ~/.local/state/imgfs; not made yet."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    return Path(os.environ.get("XDG_STATE_HOME") or f"{home}/.local/state") / "imgfs"


@dataclass(frozen=True, slots=True)
class Base:
    """What the snapshots are of.  `url` is as shown to people; `size` is of the disk, in bytes."""

    url: str
    size: int
    format: str
    kind: str  #: of the identity
    token: str


def base_of(url: str, size: int, format: str, identity: Identity | None) -> Base:
    """Raises NotPermitted for a source without an identity."""
    if identity is None:
        raise NotPermitted(
            f"{url}: nothing tells one state of it from another, so a snapshot could come to lie "
            "on other bytes; if you know that it does not change say so by -o identity=SOME-NAME"
        )
    return Base(url, size, format, identity.kind, identity.token)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`layers` are names, from the top down; `created` is seconds since 1970."""

    path: SnapshotPath
    layers: tuple[str, ...]
    created: int


class SnapshotStore:
    """All methods wait for the disk, and hold the directory's lock for as long as they run.

    They raise CorruptSnapshot for what is damaged, and OSError.
    """

    def __init__(self, url: str, root: Path | None = None) -> None:
        """Of the base that is shown as `url`; nothing is made before there is a snapshot."""
        digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        name = url.rstrip("/").rpartition("/")[2]
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
        self.url = url
        self.directory = (root or state_root()) / f"{plain[:80]}-{digest}"

    def base(self) -> Base | None:
        """What was recorded of it; None while it has no snapshot."""
        try:
            return Base(**_load(self.directory / "base"))
        except FileNotFoundError:
            return None
        except TypeError as exc:
            raise CorruptSnapshot(f"{self.directory / 'base'}: {exc}") from None

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
        if known is not None and known != base:
            raise SourceChanged(
                f"{self.url}: is not what its snapshots were taken of (in {self.directory}): "
                f"{_difference(known, base)}; bring it back, or delete them"
            )

    def pin(self, base: Base) -> None:
        """From now on the snapshots are of this: our own write has made it."""
        with self._locked():
            self._save("base", asdict(base))

    def snapshots(self) -> list[Snapshot]:
        """By their names."""
        try:
            found = _load(self.directory / "snapshots")
        except FileNotFoundError:
            if (self.directory / "base").exists():
                raise CorruptSnapshot(f"{self.directory / 'snapshots'}: is missing") from None
            return []
        try:
            return sorted(
                (
                    Snapshot(tuple(each["path"]), tuple(each["layers"]), int(each["created"]))
                    for each in found["snapshots"]
                ),
                key=lambda each: each.path,
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise CorruptSnapshot(f"{self.directory / 'snapshots'}: {exc!r}") from None

    def get(self, path: SnapshotPath) -> Snapshot:
        """Raises SnapshotNotFound."""
        for each in self.snapshots():
            if each.path == path:
                return each
        raise SnapshotNotFound(f"{self.url}: has no snapshot {'/'.join(path)}")

    def size_of(self, path: SnapshotPath) -> int:
        """Bytes of its disk.  Raises SnapshotNotFound."""
        layers = self.open_layers(self.get(path), writable=False)
        try:
            return layers[0].size
        finally:
            for layer in layers:
                layer.close()

    def own_bytes(self, snapshot: Snapshot) -> int:
        """What it takes on disk, without what others stand on too, as far as that can be seen."""
        total = 0
        for name in snapshot.layers:
            if not self.is_shared(name, snapshot.path):
                with contextlib.suppress(OSError):
                    total += (self._layer_path(name) / "data").stat().st_blocks * 512
        return total

    def has_any(self) -> bool:
        return bool(self.snapshots())

    def create(
        self, path: SnapshotPath, base: Base, size: int, top: Layer | None = None
    ) -> Layer | None:
        """Take one: of the base, or of the snapshot whose snapshots/ it is in.

        `size` is of the disk now.  `top` is the parent's top layer where the caller has it open for
        writing, and has committed all; if a layer is returned he must write that from now on.
        Raises AlreadyThere, SnapshotNotFound, SourceChanged, Busy.
        """
        with self._locked():
            self.check_base(base)
            known = {each.path: each for each in self.snapshots()}
            if path in known:
                raise AlreadyThere(f"{self.url}: has a snapshot {'/'.join(path)} already")
            if self.base() is None:
                self._save_all(())  # a base without this has lost it
                self._save("base", asdict(base))
            self._sweep(known.values())
            below: tuple[str, ...] = ()
            fresh: Layer | None = None
            if path[:-1]:
                parent = known.get(path[:-1])
                if parent is None:
                    raise SnapshotNotFound(f"{self.url}: has no snapshot {'/'.join(path[:-1])}")
                if top is None or not top.is_empty:
                    fresh, parent = self._freeze(parent, size, top)
                    known[parent.path] = parent
                below = parent.layers[1:]
            mine = Snapshot(path, (self._new_layer(size), *below), int(time.time()))
            known[path] = mine
            self._save_all(known.values())
            return fresh

    def freeze(self, path: SnapshotPath, size: int, top: Layer) -> Layer:
        """Put a new top layer over what the caller writes, and has committed; it is his to write.

        What was the top stays as it is from now on.
        """
        with self._locked():
            known = {each.path: each for each in self.snapshots()}
            fresh, snapshot = self._freeze(self.get(path), size, top)
            assert fresh is not None
            known[path] = snapshot
            self._save_all(known.values())
            return fresh

    def _freeze(
        self, snapshot: Snapshot, size: int, top: Layer | None
    ) -> tuple[Layer | None, Snapshot]:
        if top is None:
            # Nobody may be writing what is to stay as it is.
            os.close(lock_layer(self._layer_path(snapshot.layers[0])))
        name = self._new_layer(size)
        fresh = None if top is None else open_layer(self._layer_path(name), writable=True)
        return fresh, replace(snapshot, layers=(name, *snapshot.layers))

    def delete(self, path: SnapshotPath) -> None:
        """Raises SnapshotNotFound, NotEmpty when it has snapshots, Busy when it is written."""
        with self._locked():
            known = {each.path: each for each in self.snapshots()}
            snapshot = self.get(path)
            if any(each[: len(path)] == path and each != path for each in known):
                raise NotEmpty(f"{self.url}: {'/'.join(path)} has snapshots itself")
            with contextlib.suppress(FileNotFoundError):
                os.close(lock_layer(self._layer_path(snapshot.layers[0])))
            del known[path]
            if not known:
                # The next one may be of another state of the base.  Only in this order can what a
                # crash leaves be deleted again; and none of it needs space.
                (self.directory / "base").unlink(missing_ok=True)
                sync_directory(self.directory)
                (self.directory / "snapshots").unlink()
                sync_directory(self.directory)
            else:
                self._save_all(known.values())
            self._sweep(known.values())

    def rename(self, path: SnapshotPath, name: str) -> None:
        """Raises SnapshotNotFound and AlreadyThere."""
        with self._locked():
            known = {each.path: each for each in self.snapshots()}
            self.get(path)
            fresh = (*path[:-1], name)
            if fresh in known and fresh != path:
                raise AlreadyThere(f"{self.url}: has a snapshot {'/'.join(fresh)} already")
            self._save_all(
                replace(each, path=(*fresh, *each.path[len(path) :]))
                if each.path[: len(path)] == path
                else each
                for each in known.values()
            )

    def set_layers(self, path: SnapshotPath, layers: tuple[str, ...]) -> None:
        """After a merge: what was between is of no use any more, if it is nobody else's."""
        with self._locked():
            known = {each.path: each for each in self.snapshots()}
            known[path] = replace(self.get(path), layers=layers)
            self._save_all(known.values())
            self._sweep(known.values())

    def is_shared(self, layer: str, path: SnapshotPath) -> bool:
        """Does another snapshot than this one stand on the layer?"""
        return any(layer in each.layers for each in self.snapshots() if each.path != path)

    def open_layers(self, snapshot: Snapshot, *, writable: bool) -> list[Layer]:
        """All of its layers, from the top down; with `writable` the first one is locked.

        Raises Busy.
        """
        found: list[Layer] = []
        try:
            for index, name in enumerate(snapshot.layers):
                path = self._layer_path(name)
                found.append(open_layer(path, writable=writable and index == 0))
        except BaseException:
            for layer in found:
                layer.close()
            raise
        return found

    def _layer_path(self, name: str) -> Path:
        return self.directory / "layers" / name

    def _new_layer(self, size: int) -> str:
        name = secrets.token_hex(8)
        make_layer(self._layer_path(name), size)
        sync_directory(self.directory / "layers")
        return name

    def _sweep(self, snapshots: Iterable[Snapshot]) -> None:
        """Remove the layers that are nobody's: a crash left them, or the last one is gone."""
        used = {name for snapshot in snapshots for name in snapshot.layers}
        for path in (self.directory / "layers").iterdir():
            if path.name not in used:
                shutil.rmtree(path, ignore_errors=True)

    def _save_all(self, snapshots: Iterable[Snapshot]) -> None:
        self._save("snapshots", {"snapshots": [asdict(each) for each in snapshots]})

    def _save(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps({"version": VERSION, **content}, indent=1).encode()
        replace_file(self.directory / name, b"%08x\n%s\n" % (zlib.crc32(text), text))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.directory, self.directory / "layers"):
            if not path.is_dir():
                path.mkdir(mode=0o700, exist_ok=True)
                sync_directory(path.parent)
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def stores(root: Path | None = None) -> list[SnapshotStore]:
    """All that there are, by what they are of.  Raises nothing."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted((root or state_root()).iterdir()):
            with contextlib.suppress(OSError, CorruptSnapshot, TypeError):
                found.append(SnapshotStore(Base(**_load(path / "base")).url, path.parent))
    return found


def _load(path: Path) -> dict[str, Any]:
    """Raises CorruptSnapshot, and OSError."""
    checksum, _, text = path.read_bytes().partition(b"\n")
    text = text.removesuffix(b"\n")
    if checksum != b"%08x" % zlib.crc32(text):
        raise CorruptSnapshot(f"{path}: is damaged: its checksum is wrong")
    content: dict[str, Any] = json.loads(text)
    version = content.pop("version", None)
    if version != VERSION:
        raise CorruptSnapshot(f"{path}: version {version} is not known")
    return content


def _difference(known: Base, now: Base) -> str:
    old, new = asdict(known), asdict(now)
    changed = [name for name in old if old[name] != new[name]]
    return ", ".join(f"{name} was {old[name]}, is {new[name]}" for name in changed)
