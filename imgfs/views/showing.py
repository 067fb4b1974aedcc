"""A disk as a file of each format: which there are, and their views."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from imgfs.errors import UnsupportedFeature
from imgfs.extents import ExtentList
from imgfs.formats.layout import About, Layout
from imgfs.views.encoded import EncodedView
from imgfs.views.view import View
from imgfs.views.work import work

#: What stands behind a disk's name, and the module that lays such a file out.
SHOWN = {
    ".qcow2": "imgfs.formats.qcow2_layout",
    ".vmdk": "imgfs.formats.vmdk_layout",
    ".stream.vmdk": "imgfs.formats.vmdk_stream_layout",
    ".vdi": "imgfs.formats.vdi_layout",
    ".vhd": "imgfs.formats.vhd_layout",
    ".vhdx": "imgfs.formats.vhdx_layout",
}


async def encoded(disk: View, extension: str, name: str, identity: str) -> EncodedView:
    """The disk in the format that the extension stands for; `identity` tells it from all others.

    Raises UnsupportedFeature where the format cannot hold it, and what reading its map raises.
    """
    extents = await disk.extents(0, disk.size)
    about = About(name, identity, disk.mtime_ns // 1_000_000_000)
    layout = await work(len(extents), _layout, extension, extents, about)
    return EncodedView(name, disk, layout)


def refusals(extents: ExtentList, about: About) -> dict[str, str]:
    """[blocks] By the extension: why the format cannot hold the disk."""
    found = {}
    for extension in SHOWN:
        try:
            _layout(extension, extents, about)
        except UnsupportedFeature as exc:
            found[extension] = str(exc)
    return found


def _layout(extension: str, extents: ExtentList, about: About) -> Layout:
    layout: Callable[[ExtentList, About], Layout] = import_module(SHOWN[extension]).layout
    return layout(extents, about)
