"""What is looked at in images before qemu opens them: which file they stand on."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from imgfs.errors import CorruptImage, ImgfsError
from imgfs.formats.disk import Backing
from imgfs.formats.served import ALONE, SERVED, backing_of
from tests.drive import Files
from tests.formats import qemu


def backing(content: bytes, format: str) -> Backing | None:
    return Files(content).run(backing_of("disk", format))


def made(path: Path, format: str, below: str | None, kind: str = "raw") -> bytes:
    words = [] if below is None else ["-u", "-b", below, "-F", kind]
    qemu.img("create", "-q", "-f", format, *words, path, "1M")
    return path.read_bytes()


@pytest.mark.parametrize("name", ["base", "a name, with: all/kinds of?", "ä" * 300])
def test_the_name_of_a_backing_file(tmp_path: Path, name: str) -> None:
    assert backing(made(tmp_path / "a", "qed", f"/{name}"), "qed") == Backing(f"/{name}", "raw")
    qed = made(tmp_path / "b", "qed", f"/{name}", "qcow2")
    assert backing(qed, "qed") == Backing(f"/{name}", None)
    qcow = made(tmp_path / "c", "qcow", f"/{name}")
    assert backing(qcow, "qcow") == Backing(f"/{name}", None)


@pytest.mark.parametrize("format", ["qed", "qcow"])
def test_without_one(tmp_path: Path, format: str) -> None:
    content = made(tmp_path / "a", format, None)
    assert backing(content, format) is None
    at, kept = ALONE[format]
    assert (
        bytes(a & b for a, b in zip(content[at:], kept, strict=False))
        == content[at : at + len(kept)]
    )


def test_formats_that_stand_on_nothing() -> None:
    for format in set(SERVED) - {"qed", "qcow"}:
        assert backing(b"", format) is None


BAD = [
    ("qed", slice(0, 4), b"QED1", "does not begin with the header of a QED"),
    ("qed", slice(30, None), b"", "does not begin with the header of a QED"),
    ("qed", slice(60, 64), struct.pack("<I", 1024), "backing_filename_size is 1024 at "),
    ("qed", slice(60, 64), bytes(4), "backing_filename_size is 0 at "),
    ("qed", slice(56, 60), b"\xff" * 4, "inside of the header"),
    ("qed", slice(66, None), b"", "the name of its backing file at 64 is past the end"),
    ("qcow", slice(4, 8), b"\0\0\0\2", "does not begin with the header of a qcow"),
    ("qcow", slice(16, 20), b"\xff" * 4, "backing_file_size is 4294967295: at most 1023"),
    ("qcow", slice(8, 16), b"\x7f" * 8, "is past the end"),
]


@pytest.mark.parametrize(("format", "where", "what", "said"), BAD)
def test_headers_that_lie(
    tmp_path: Path, format: str, where: slice, what: bytes, said: str
) -> None:
    content = bytearray(made(tmp_path / "a", format, "/base"))
    content[where] = what
    with pytest.raises(CorruptImage, match=f"^disk: .*{said}"):
        backing(bytes(content), format)


@pytest.mark.parametrize("format", ["qed", "qcow"])
def test_mutations(tmp_path: Path, format: str) -> None:
    rng, whole = random.Random(1), made(tmp_path / "a", format, "/base")[:4096]
    for _ in range(2000):
        content = bytearray(whole)
        at = rng.randrange(80)
        content[at : at + 4] = rng.choice([bytes(4), b"\xff" * 4, rng.randbytes(4)])
        try:
            backing(bytes(content[: rng.choice([4096, rng.randrange(100)])]), format)
        except ImgfsError as exc:
            assert str(exc).startswith("disk: ")
