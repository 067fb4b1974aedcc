"""What snapshots are of: one state of a disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from imgfs.errors import CorruptSnapshot, NotPermitted
from imgfs.overlays import basefile
from imgfs.sources.base import Identity


@dataclass(frozen=True, slots=True)
class Base:
    """What the snapshots are of.  `url` is as shown to people; `size` is of the disk, in bytes."""

    url: str
    size: int
    format: str
    kind: str  #: of the identity
    token: str


def base_of(url: str, size: int, format: str, identity: Identity | None) -> Base:
    """Raises NotPermitted for a source without an identity."""
    if identity is None:
        raise NotPermitted(
            f"{url}: nothing tells one state of it from another, so a snapshot could come to lie "
            "on other bytes; if you know that it does not change say so by -o identity=SOME-NAME"
        )
    return Base(url, size, format, identity.kind, identity.token)


def not_ours(directory: Path, url: str) -> str:
    return f"{directory / 'base'}: is of {url}, and not of what is here; bring the right one back"


def load_base(path: Path) -> Base:
    """Raises CorruptSnapshot, and OSError."""
    try:
        return Base(**basefile.load(path))
    except TypeError as exc:
        raise CorruptSnapshot(f"{path}: {exc}") from None


def difference(known: Base, now: Base) -> str:
    old, new = asdict(known), asdict(now)
    changed = [name for name in old if old[name] != new[name]]
    return ", ".join(f"{name} was {old[name]}, is {new[name]}" for name in changed)
