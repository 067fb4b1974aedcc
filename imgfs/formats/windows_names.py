"""The names that VHD and VHDX files have for their parents: paths of the machine they came from."""

from __future__ import annotations

import re

_DRIVE_OR_SHARE = re.compile(r"^(?:[A-Za-z]:|\\)")


def local_name(path: str) -> str:
    """The path as one of here.

    What is relative stays so; of what begins at a drive, a volume or a share only the last
    component means anything, and that is looked for beside the image.
    """
    if _DRIVE_OR_SHARE.match(path):
        return path.replace("/", "\\").rpartition("\\")[2]
    return path.replace("\\", "/").removeprefix("./")
