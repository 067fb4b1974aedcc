"""From a file's bytes to the disk in it: its format, and the files below it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats.disk import Disk
from imgfs.formats.probe import RAW, probe
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


@dataclass(frozen=True, slots=True)
class Chain:
    """A disk and how it was found; `formats` are of the layers, from the top down."""

    disk: View
    layers: tuple[Layer, ...]
    formats: tuple[str, ...]
    files: tuple[StoredView, ...]  #: all that are read for it

    @property
    def identity(self) -> Identity | None:
        """Of all the files that the disk is in; None where one of them has none."""
        found = [file.source.stat.identity for file in self.files]
        known = [identity for identity in found if identity is not None]
        if len(known) < len(found):
            return None
        return Identity("+".join(i.kind for i in known), "+".join(i.token for i in known))

    def base(self, url: str, size: int | None = None) -> Base:
        """What snapshots of it are of; of another size when we have changed that.

        Raises NotPermitted when it has no identity.
        """
        return base_of(
            url, self.disk.size if size is None else size, "+".join(self.formats), self.identity
        )


async def open_chain(
    name: str, stored: StoredView, open_beside: OpenBeside, format: str | None = None
) -> Chain:
    """The disk in the file, to be called `name`.  Without a format it is probed.

    Of a raw file the disk is the file's own view.  Raises CorruptImage, UnsupportedFeature, and
    what reading and opening raise.
    """
    layers: list[Layer] = []
    formats: list[str] = []
    opened = [stored]
    view, wanted = stored, format
    wanted_id: str | None = None
    while True:
        found = wanted if wanted is not None else await drive(probe(view.size), [view])
        layer = await _open_layer(view, found, open_beside, opened)
        own_id = layer.disk.own_id if layer.disk is not None else None
        if wanted_id is not None and own_id != wanted_id:
            raise CorruptImage(
                f"{view.name}: is not what {layers[-1].files[0].name} was made on: "
                f"its id is {own_id}, not {wanted_id}"
            )
        layers.append(layer)
        formats.append(found)
        backing = layer.disk.backing if layer.disk is not None else None
        if backing is None:
            break
        if len(layers) == MOST_LAYERS:
            raise UnsupportedFeature(f"{stored.name}: more than {MOST_LAYERS} backing files")
        below = await open_beside(view, backing.name)
        if any(below is layer.files[0] for layer in layers):
            raise CorruptImage(f"{stored.name}: its backing files form a loop at {below.name}")
        opened.append(below)
        view, wanted, wanted_id = below, backing.format, backing.wanted_id
    disk = stored if layers[0].disk is None else DecodedView(name, layers)
    return Chain(disk, tuple(layers), tuple(formats), tuple(opened))


async def _open_layer(
    view: StoredView, format: str, open_beside: OpenBeside, opened: list[StoredView]
) -> Layer:
    if format == RAW:
        return Layer([view])
    module = READERS.get(format)
    if module is None:
        raise UnsupportedFeature(
            f"{view.name}: is {format}, which imgfs does not read itself; "
            f"serve it by -o command='qemu-nbd -r -f {format} …', or mount it with -o format=raw"
        )
    reader: Callable[[str, int], Steps[Disk]] = import_module(module).open_disk
    files: list[View] = [view]

    async def beside(name: str) -> View:
        opened.append(await open_beside(view, name))
        return opened[-1]

    return Layer(files, await drive(reader(view.name, view.size), files, beside))
