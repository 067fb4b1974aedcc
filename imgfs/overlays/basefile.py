"""The file `base`: a checksum, and then JSON that says what the snapshots beside it are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgfs.checksums import decode_document, encode_document, seed_of
from imgfs.errors import CorruptSnapshot
from imgfs.overlays.layer import replace_file

VERSION = 2  # version 1 had a CRC-32
_SEED = seed_of("base", "")  # whose it is its content says


def save(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, encode_document(VERSION, content, _SEED))


def load(path: Path) -> dict[str, Any]:
    """Raises CorruptSnapshot, OtherVersion and OSError."""
    return decode_document(path.read_bytes(), VERSION, _SEED, str(path))


def unreadable(root: Path) -> Iterator[str]:
    """Of which directories of snapshots nobody can tell what they are of, and why."""
    try:
        for path in sorted(root.iterdir()):
            if (why := _why_not(path / "base")) is not None:
                yield why
    except FileNotFoundError:
        pass
    except OSError as exc:
        yield f"{exc.filename}: {exc.strerror}"


def _why_not(path: Path) -> str | None:
    try:
        load(path)
    except NotADirectoryError:
        pass
    except FileNotFoundError:
        if (path.parent / "snapshots").exists():
            return f"{path}: is missing; bring it back"
    except OSError as exc:
        return f"{exc.filename}: {exc.strerror}"
    except CorruptSnapshot as exc:
        return str(exc)
    return None
