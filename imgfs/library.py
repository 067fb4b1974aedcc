"""What `import imgfs` gives to a program that runs under trio: images, without a mount.

Everything is read through the views that a mount shows, uncached.  For programs without trio there
is `imgfs.plain`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from imgfs.config.options import Options
from imgfs.errors import UsageError
from imgfs.extents import ExtentList
from imgfs.formats.probe import RAW
from imgfs.guest.disk import Guest
from imgfs.opener.disks import open_disk, open_snapshot
from imgfs.overlays.records import snapshot_path
from imgfs.overlays.store import SnapshotStore
from imgfs.views.opening import Chain
from imgfs.views.showing import SHOWN, encoded
from imgfs.views.slice import SliceView, parts_of
from imgfs.views.sparse import SparseView, look
from imgfs.views.view import View


class DiskImage:
    """A disk that can be read, and what else it can be shown as.

    Offsets, lengths and sizes are bytes.  It is good for as long as the block runs that gave it.
    Reads may run concurrently, and may be cancelled.
    """

    def __init__(self, view: View, identity: str) -> None:
        """For `open_image` only; `identity` tells this disk from all others."""
        self._view = view
        self._identity = identity
        self._guest: Guest | None = None
        self._looking = trio.Lock()

    @property
    def name(self) -> str:
        return self._view.name

    @property
    def size(self) -> int:
        return self._view.size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises OutOfRange when they are not all inside, SourceChanged when the source is not what
        was opened any more, SourceUnreachable, and other ImgfsErrors.
        """
        return bytes(await self._view.read(offset, length))

    async def extents(self, offset: int = 0, length: int | None = None) -> ExtentList:
        """What is data and what reads as zeroes; by default of all of it.  Raises as `read`."""
        length = self.size - offset if length is None else length
        return await self._view.extents(offset, length)

    async def shown_as(self, format: str) -> DiskImage:
        """The bytes of a file in this format, made as they are read.

        `format` is raw, qcow2, vmdk, stream.vmdk, vdi, vhd or vhdx.  Raises UsageError for another,
        UnsupportedFeature where the format cannot hold the disk, and as `read`.
        """
        return DiskImage(await shown_as(self._view, format, self.name, self._identity), "")

    async def sparse(self) -> DiskImage:
        """The disk without the blocks that its filesystems do not use.  Raises as `read`."""
        guest = await self._look()
        view = SparseView(self.name, self._view, guest.free)
        return DiskImage(view, "sparse " + self._identity)

    async def partitions(self) -> dict[str, DiskImage]:
        """The partitions by number, and the LVM volumes by name.  Raises as `read`."""
        return {
            name: DiskImage(SliceView(name, self._view, ranges), f"{name} of {self._identity}")
            for name, ranges in parts_of(await self._look()).items()
        }

    async def _look(self) -> Guest:
        async with self._looking:
            if self._guest is None:
                self._guest = await look(self._view)
            return self._guest


class OpenImage(DiskImage):
    """The disk in a source.

    `url` is the source without secrets; `formats` those of the image and its backing files, from
    the top down, as qemu calls them.
    """

    def __init__(self, url: str, chain: Chain) -> None:
        super().__init__(chain.disk, chain.token(url))
        self.url = url
        self.formats = chain.formats
        self._chain = chain

    @property
    def stored(self) -> DiskImage:
        """The bytes of the image's own file as they are stored."""
        view = self._chain.files[0]
        return DiskImage(view, "stored " + self._identity)

    async def snapshots(self) -> list[str]:
        """Names as in a mount: `x`, or `x/y` for y in x's snapshots/."""
        found = await trio.to_thread.run_sync(SnapshotStore(self.url).snapshots)
        return ["/".join(each.path) for each in found]

    @asynccontextmanager
    async def snapshot(self, name: str) -> AsyncIterator[DiskImage]:
        """The disk of a snapshot, for as long as the block runs; nobody else writes it then.

        Raises SnapshotNotFound, Busy when it is mounted, SourceChanged when it is of another state
        of the source, UsageError for what cannot be a name.
        """
        async with open_snapshot(snapshot_path(name), self.url, self._chain) as disk:
            layers = " ".join(layer.path.name for layer in disk.layers)
            yield DiskImage(disk, f"{layers} of {self._identity}")


@asynccontextmanager
async def open_image(
    source: str | os.PathLike[str], options: Options | None = None
) -> AsyncIterator[OpenImage]:
    """The disk in a path or a URL, as `imgfs info` takes it, for as long as the block runs.

    Raises UsageError (also where trio does not run), SourceNotFound, AccessDenied,
    SourceUnreachable, CorruptImage, UnsupportedFeature, all of them ImgfsErrors; what the block
    raises passes unchanged.
    """
    try:
        trio.lowlevel.current_task()
    except RuntimeError:  # it is another library's loop, asyncio's most likely
        said = "open_image runs under trio only; use imgfs.plain.open_image elsewhere"
        raise UsageError(said) from None
    async with open_disk(os.fspath(source), options or Options()) as (url, chain):
        yield OpenImage(url, chain)


async def shown_as(view: View, format: str, name: str, identity: str) -> View:
    """The view as a file of the format, to be called `name`.  Raises as `DiskImage.shown_as`."""
    if format == RAW:
        return view
    extension = f".{format}"
    if extension not in SHOWN:
        known = ", ".join([RAW, *(each[1:] for each in SHOWN)])
        raise UsageError(f"format {format}: name one of {known}")
    return await encoded(view, extension, name, identity)
