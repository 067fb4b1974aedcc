"""What a mount tells of bytes that it cannot make durable: the schema of `.imgfs/sync.json`.

Reading that file makes all durable that was written by then, and says what is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict


class Unsaved(TypedDict):
    """Something that was written and is not durable."""

    name: str  #: of the view
    bytes: int  #: of it; 0: not known
    why: str
    place: str  #: the directory that its files are in; empty: they are at the source
    can_retry: bool  #: a later attempt may save it


class SyncStatus(TypedDict):
    """The whole file; `outcome` is where the process says how it ends (daemon/outcome.py)."""

    pid: int
    outcome: str
    unsaved: list[Unsaved]


def at_umount(each: Unsaved) -> str:
    """The line for whoever wants to unmount."""
    return f"{_cannot(each)}; {_mend(each)} and unmount again, or --force gives them up"


def while_holding(each: Unsaved) -> str:
    """The line for the log of a process that was to end and does not."""
    return f"{_cannot(each)}; {_mend(each)}; another signal, or imgfs umount --force, gives them up"


def when_lost(unsaved: Iterable[Unsaved]) -> str:
    """One line that says what is lost."""
    return "; ".join(f"{each['name']}: {_what(each)} are lost: {each['why']}" for each in unsaved)


def _cannot(each: Unsaved) -> str:
    how = "cannot be made durable" if each["can_retry"] else "may be lost"
    return f"{each['name']}: {_what(each)} {how}: {each['why']}"


def _what(each: Unsaved) -> str:
    return f"its last {each['bytes']} bytes" if each["bytes"] else "its last bytes"


def _mend(each: Unsaved) -> str:
    place = each["place"]
    if not each["can_retry"]:
        return "copy what can still be read"
    if "space" in each["why"] or "quota" in each["why"].lower():
        return f"free space in {place}"
    return f"mend {place}" if place else "mend its source"
