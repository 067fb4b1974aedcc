"""How images are called: what a mount shows for a file's, an export's or an object's name.

All names are text with surrogates for bytes that are not UTF-8, as os.fsdecode gives it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from imgfs.formats.vmdk_descriptor import is_part

RAW_EXTENSIONS = (".raw", ".img", ".dd", ".iso", ".bin")
#: In a directory only files with one of these are images.
IMAGE_EXTENSIONS = (
    *RAW_EXTENSIONS,
    *(".qcow2", ".qcow", ".vmdk", ".vdi", ".vhd", ".vpc", ".vhdx", ".avhdx", ".qed", ".dmg"),
    *(".parallels", ".hdd"),
)
RESERVED = (".imgfs", "originals")
_MOST_BYTES = 255 - len(".delta.qcow2")  # a name that gets an extension must fit in a directory


def image_name(file_name: str) -> str:
    """The image's name: the file's without its known image extension."""
    stem, extension = PurePosixPath(file_name).stem, PurePosixPath(file_name).suffix
    return stem if extension.lower() in IMAGE_EXTENSIONS and stem else file_name


def is_image(file_name: str) -> bool:
    """Is it an image, in a directory of all kinds of files?"""
    known = PurePosixPath(file_name).suffix.lower() in IMAGE_EXTENSIONS
    return known and not is_part(file_name)  # of a vmdk, whose descriptor is the image


def directory_names(file_names: Iterable[str]) -> dict[str, str]:
    """The name of each image's directory, and its file.

    Where two would share a name both keep their extensions.
    """
    names = {file_name: image_name(file_name) for file_name in file_names}
    while True:
        used = Counter(names.values())
        shared = [file for file, name in names.items() if used[name] > 1 and name != file]
        if not shared:
            return {shown(name): file_name for file_name, name in names.items()}
        for file_name in shared:
            names[file_name] = file_name


def shown(name: str) -> str:
    """A name that can stand beside `.imgfs` and `originals`, and is not too long.

    A reserved one, or one that looks like this of a reserved one, gets a % in front; of a long one
    the end is a digest.
    """
    if is_reserved(name):
        name = "%" + name
    raw = encode(name)
    if len(raw) <= _MOST_BYTES:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:12]
    return os.fsdecode(raw[: _MOST_BYTES - 13]) + "~" + digest


def is_reserved(name: str) -> bool:
    """Is it imgfs's own name, or what `shown` makes of one?"""
    return name.lstrip("%") in RESERVED


def encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
