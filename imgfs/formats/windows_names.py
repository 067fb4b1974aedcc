"""The names that VHD and VHDX files have for their parents: paths of the machine they came from."""

from __future__ import annotations

import re
from collections.abc import Iterable

_DRIVE_OR_SHARE = re.compile(r"^(?:[A-Za-z]:|\\)")


def local_name(path: str) -> str:
    """The path as one of here.

    What is relative stays so; of what begins at a drive, a volume or a share only the last
    component means anything, and that is looked for beside the image.
    """
    if _DRIVE_OR_SHARE.match(path):
        return path.replace("/", "\\").rpartition("\\")[2]
    return path.replace("\\", "/").removeprefix("./")


def local_names(paths: Iterable[str]) -> tuple[str, ...]:
    """As `local_name`, each once; and then the last components alone, since images that lay in
    several directories are often brought together in one."""
    found = [local_name(path) for path in paths]
    found += [name.rpartition("/")[2] for name in found]
    return tuple(dict.fromkeys(name for name in found if name))
