"""A disk as a file of each format: which there are, and their views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList
from imgfs.formats.layout import About, Layout
from imgfs.views.encoded import EncodedView
from imgfs.views.view import View
from imgfs.views.work import SHORT, work

#: What stands behind a disk's name, and the module that lays such a file out.
SHOWN = {
    ".qcow2": "imgfs.formats.qcow2_layout",
    ".vmdk": "imgfs.formats.vmdk_layout",
    ".stream.vmdk": "imgfs.formats.vmdk_stream_layout",
    ".vdi": "imgfs.formats.vdi_layout",
    ".vhd": "imgfs.formats.vhd_layout",
    ".vhdx": "imgfs.formats.vhdx_layout",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What `stat` says of a file; sizes in bytes, `mode` permission bits."""

    size: int
    stored_bytes: int
    mtime_ns: int
    mode: int

    @property
    def ctime_ns(self) -> int:
        return self.mtime_ns


async def encoded(disk: View, extension: str, name: str, identity: str) -> EncodedView:
    """The disk in the format that the extension stands for; `identity` tells it from all others.

    Raises UnsupportedFeature where the format cannot hold it, and what reading its map raises.
    """
    extents = await disk.extents(0, disk.size)
    layout, stored = await work(
        len(extents), _laid_out, extension, extents, _about(disk, name, identity)
    )
    return EncodedView(name, disk, layout, stored)


async def shape(
    disk: View, extents: ExtentList, extension: str, name: str, identity: str
) -> Shape | None:
    """As `encoded`, for who only looks at the file; None: its view is needed for that."""
    about = _about(disk, name, identity)
    if len(extents) <= SHORT:
        # Without a turn of the loop: who lists a directory asks for all of its files.
        layout, stored = _laid_out(extension, extents, about)
    else:
        layout, stored = await work(len(extents), _laid_out, extension, extents, about)
    return None if stored is None else Shape(layout.size, stored, disk.mtime_ns, disk.mode)


def refusals(extents: ExtentList, about: About) -> dict[str, str]:
    """[blocks] By the extension: why the format cannot hold the disk."""
    found = {}
    for extension in SHOWN:
        try:
            layout_of(extension, extents, about)
        except UnsupportedFeature as exc:
            found[extension] = str(exc)
    return found


def layout_of(extension: str, extents: ExtentList, about: About) -> Layout:
    """Raises UnsupportedFeature."""
    layout: Callable[[ExtentList, About], Layout] = import_module(SHOWN[extension]).layout
    return layout(extents, about)


def _laid_out(extension: str, extents: ExtentList, about: About) -> tuple[Layout, int | None]:
    layout = layout_of(extension, extents, about)
    return layout, layout.stored_bytes(extents)


def _about(disk: View, name: str, identity: str) -> About:
    return About(name, identity, disk.mtime_ns // 1_000_000_000)
