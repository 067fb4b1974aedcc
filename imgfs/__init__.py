"""imgfs: remote disk images as ordinary files, and as objects in a program.

    async with imgfs.open_image("ssh://kool/disk.qcow2") as image:      # under trio
        data = await image.read(0, 512)

    with imgfs.plain.open_image("ssh://kool/disk.qcow2") as image:      # anywhere else
        data = image.read(0, 512)

What these names stand for is imported when they are used first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imgfs import plain
    from imgfs.config.options import Options
    from imgfs.errors import ImgfsError
    from imgfs.extents import Extent, ExtentList, Flags
    from imgfs.library import DiskImage, OpenImage, open_image

__version__ = "0.1.0"
__all__ = [
    "DiskImage",
    "Extent",
    "ExtentList",
    "Flags",
    "ImgfsError",
    "OpenImage",
    "Options",
    "open_image",
    "plain",
]

_PLACES = {
    "DiskImage": "imgfs.library",
    "Extent": "imgfs.extents",
    "ExtentList": "imgfs.extents",
    "Flags": "imgfs.extents",
    "ImgfsError": "imgfs.errors",
    "OpenImage": "imgfs.library",
    "Options": "imgfs.config.options",
    "open_image": "imgfs.library",
}


def __getattr__(name: str) -> object:
    if name == "plain":
        return importlib.import_module("imgfs.plain")
    if name not in _PLACES:
        raise AttributeError(f"module 'imgfs' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
