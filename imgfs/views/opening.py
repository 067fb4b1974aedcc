"""From a file's bytes to the disk in it: its format, and the files below it."""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module

from imgfs.errors import (
    CorruptImage,
    ImgfsError,
    SnapshotNotFound,
    SourceNotFound,
    UnsupportedFeature,
    UsageError,
)
from imgfs.formats.containers import CONTAINERS
from imgfs.formats.disk import Backing, Disk
from imgfs.formats.probe import RAW, probe
from imgfs.formats.served import SERVED, Node, ServedDisk, backing_of
from imgfs.overlays.store import Base, base_of
from imgfs.sources.base import Identity
from imgfs.steps import Steps
from imgfs.views.decoded import DecodedView, Layer
from imgfs.views.drive import drive
from imgfs.views.through import StoredView
from imgfs.views.view import View

#: The formats that imgfs reads itself, as qemu calls them, and the modules that do.
READERS = {
    "qcow2": "imgfs.formats.qcow2",
    "vmdk": "imgfs.formats.vmdk",
    "vdi": "imgfs.formats.vdi",
    "vpc": "imgfs.formats.vhd",
    "vhdx": "imgfs.formats.vhdx",
}
MOST_LAYERS = 64

#: Opens the file that a view's header names.  Raises UsageError where it must not be followed.
OpenBeside = Callable[[StoredView, str], Awaitable[StoredView]]
#: Has qemu open a node, and gives the disk.
Serve = Callable[[Node], Awaitable[View]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a person said of an image."""

    format: str | None = None  #: None: what its content says
    snapshot: str | None = None  #: the id or name of an internal one, whose disk is meant
    has_key: bool = False  #: of LUKS


@dataclass(frozen=True, slots=True)
class Chain:
    """A disk and how it was found; `formats` are of the layers, from the top down."""

    disk: View
    layers: tuple[Layer, ...]
    formats: tuple[str, ...]
    files: tuple[StoredView, ...]  #: all that are read for it
    snapshot: str | None = None  #: of the image's own, whose disk it is

    @property
    def identity(self) -> Identity | None:
        """Of all the files that the disk is in; None where one of them has none."""
        return self._joined([file.source.stat.identity for file in self.files])

    @property
    def identity_anywhere(self) -> Identity | None:
        """The same in words that do not depend on the machine."""
        return self._joined([file.source.identity_anywhere for file in self.files])

    def _joined(self, found: list[Identity | None]) -> Identity | None:
        known = [identity for identity in found if identity is not None]
        if len(known) < len(found):
            return None
        token = "+".join(i.token for i in known)
        if self.snapshot is not None:  # another disk in the same files
            token += f"@{self.snapshot}"
        return Identity("+".join(i.kind for i in known), token)

    def backing(self, url: str) -> tuple[str, str]:
        """What an overlay on the disk names as below it, and its format.

        Raises UnsupportedFeature where a name cannot say what is meant.
        """
        if self.snapshot is not None:
            raise UnsupportedFeature(f"{url}: no file can be on top of a snapshot inside of it")
        return url, self.formats[0]

    def token(self, url: str) -> str:
        """What tells the disk from all others, as far as that is known."""
        identity = self.identity
        return f"{url} {self.disk.size}" if identity is None else identity.token

    def base(self, url: str, size: int | None = None) -> Base:
        """What snapshots of it are of; of another size when we have changed that.

        Raises NotPermitted when it has no identity.
        """
        return base_of(
            url, self.disk.size if size is None else size, "+".join(self.formats), self.identity
        )


async def open_chain(
    name: str,
    stored: StoredView,
    open_beside: OpenBeside,
    asked: Asked = Asked(),
    serve: Serve | None = None,
) -> Chain:
    """The disk in the file, to be called `name`.  Without a format it is probed.

    Of a raw file the disk is the file's own view.  Raises CorruptImage, UnsupportedFeature,
    SnapshotNotFound, and what reading and opening raise.
    """
    layers: list[Layer] = []
    formats: list[str] = []
    opened = [stored]
    view, wanted, snapshot = stored, asked.format, asked.snapshot
    wanted_ids: tuple[str, ...] | None = None
    while True:
        found = wanted if wanted is not None else await drive(probe(view.size), [view])
        if found == "luks" and not asked.has_key:
            # Without a key the bytes as they are are what one can do something with.
            if wanted is not None:
                raise UnsupportedFeature(
                    f"{view.name}: is LUKS; name its key with -o luks_key=FILE"
                )
            found = RAW
        if snapshot is not None and found != "qcow2":
            raise SnapshotNotFound(f"{view.name}: is {found}, which has no snapshots of its own")
        if found in SERVED:
            assert serve is not None, found
            layer = await _open_served(view, found, open_beside, opened, serve)
        else:
            layer = await _open_layer(view, found, open_beside, opened, snapshot)
        own_id = layer.disk.own_id if layer.disk is not None else None
        if wanted_ids is not None and own_id not in wanted_ids:
            raise CorruptImage(
                f"{view.name}: is not what {layers[-1].files[0].name} was made on: "
                f"its id is {own_id}, not {' or '.join(wanted_ids)}"
            )
        layers.append(layer)
        formats.append(found)
        backing = layer.disk.backing if layer.disk is not None else None
        if backing is None:
            break
        if len(layers) == MOST_LAYERS:
            raise UnsupportedFeature(f"{stored.name}: more than {MOST_LAYERS} backing files")
        below = await _open_below(view, backing, open_beside)
        if any(below is layer.files[0] for layer in layers):
            raise CorruptImage(f"{stored.name}: its backing files form a loop at {below.name}")
        opened.append(below)
        view, wanted, wanted_ids = below, backing.format, backing.wanted_ids
        snapshot = None
    disk = stored if layers[0].disk is None else DecodedView(name, layers)
    return Chain(disk, tuple(layers), tuple(formats), tuple(opened), asked.snapshot)


async def _open_below(view: StoredView, backing: Backing, open_beside: OpenBeside) -> StoredView:
    """The first file of the backing's names that is there, and is the one that is meant.

    Where none of them is, what is wrong with the first one that is there, or else with the first.
    """
    failure: ImgfsError | None = None
    found: StoredView | None = None
    for name in (backing.name, *backing.other_names):
        try:
            below = await open_beside(view, name)
            if not backing.other_names:
                return below
            found = found or below
            layer = await _open_layer(below, backing.format or RAW, open_beside, [])
        except (UsageError, SourceNotFound, CorruptImage, UnsupportedFeature) as exc:
            failure = failure or exc
            continue
        own_id = None if layer.disk is None else layer.disk.own_id
        if backing.wanted_ids is None or own_id in backing.wanted_ids:
            return below
    if found is not None:
        return found  # whoever reads its header is told
    assert failure is not None
    raise failure


async def _open_layer(
    view: StoredView,
    format: str,
    open_beside: OpenBeside,
    opened: list[StoredView],
    snapshot: str | None = None,
) -> Layer:
    if format == RAW:
        return Layer([view])
    module = READERS.get(format)
    if module is None:
        raise _not_read(view.name, format)
    reader: Callable[..., Steps[Disk]] = import_module(module).open_disk
    files: list[View] = [view]

    async def beside(name: str) -> View:
        opened.append(await open_beside(view, name))
        return opened[-1]

    steps = reader(view.name, view.size, **({} if snapshot is None else {"snapshot": snapshot}))
    return Layer(files, await drive(steps, files, beside))


def _not_read(name: str, format: str) -> UnsupportedFeature:
    found = CONTAINERS.get(format)
    if found is None:
        return UnsupportedFeature(f"{name}: {format} is no format that imgfs knows")
    advice = found.advice.format(*[shlex.quote(name)] * found.advice.count("{}"))
    return UnsupportedFeature(
        f"{name}: is {found.what}, not a disk; {advice}; -o format=raw takes its bytes as they are"
    )


async def _open_served(
    view: StoredView,
    format: str,
    open_beside: OpenBeside,
    opened: list[StoredView],
    serve: Serve,
) -> Layer:
    """The disk as qemu reads it, with all that is below: it is told what that is."""
    found: list[tuple[str, StoredView]] = [(format, view)]
    while (backing := await _backing(*found[-1], format, open_beside, opened)) is not None:
        if len(found) == MOST_LAYERS:
            raise UnsupportedFeature(f"{view.name}: more than {MOST_LAYERS} backing files")
        below = await open_beside(found[-1][1], backing.name)
        if any(below is file for _, file in found):
            raise CorruptImage(f"{view.name}: its backing files form a loop at {below.name}")
        opened.append(below)
        probed = await drive(probe(below.size), [below]) if backing.format is None else None
        found.append((backing.format or probed or RAW, below))
    node: Node | None = None
    for kind, file in reversed(found):
        node = Node(kind, file, node)
    assert node is not None
    disk = await serve(node)
    files: list[View] = [file for _, file in found]
    return Layer([*files, disk], ServedDisk(disk.size, len(files)))


async def _backing(
    format: str, view: StoredView, top: str, open_beside: OpenBeside, opened: list[StoredView]
) -> Backing | None:
    if format == RAW:
        return None
    if format in SERVED:
        return await drive(backing_of(view.name, format), [view])
    layer = await _open_layer(view, format, open_beside, opened)
    if format != "qcow2" or layer.disk is None or len(layer.files) > 1:
        raise UnsupportedFeature(
            f"{view.name}: below a {top} there may be raw, qcow2, qed and qcow, in one file each"
        )
    return layer.disk.backing
