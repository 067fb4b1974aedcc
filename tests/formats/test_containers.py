"""Archives, compressed files and backups are named, by files that their own programs make."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from imgfs.formats.containers import CONTAINERS, container
from imgfs.formats.probe import probe
from tests.drive import Files
from tests.mounts import imgfs

DISK = bytes(100_000) + b"disk" * 1000


def probed(content: bytes) -> str:
    name: str = Files(content).run(probe(len(content)))
    return name


def tar_of(name: str, format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(DISK)
        tar.addfile(info, io.BytesIO(DISK))
    return out.getvalue()


def zip_of(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("disk.img", content)
    return out.getvalue()


def old_tar() -> bytes:
    """Of before POSIX: no magic number."""
    block = bytearray(tar_of("disk.img", tarfile.USTAR_FORMAT))
    block[257:512] = bytes(255)
    checksum = sum(block[:148]) + 8 * 32 + sum(block[156:512])
    block[148:156] = b"%06o\0 " % checksum
    return bytes(block)


MADE = {
    "xz": lzma.compress(DISK),
    "gzip": gzip.compress(DISK),
    "bzip2": bz2.compress(DISK),
    "zstd": zstandard.compress(DISK),
    "zip": zip_of(DISK),
    "tar": tar_of("disk.img", tarfile.GNU_FORMAT),
    "ova": tar_of("machine.ovf", tarfile.USTAR_FORMAT),
}


@pytest.mark.parametrize("kind", MADE)
def test_what_programs_make(kind: str) -> None:
    assert probed(MADE[kind]) == kind


def test_other_forms_of_the_same() -> None:
    assert probed(bz2.compress(b"")) == "bzip2"
    assert probed(zip_of(b"")) == "zip"
    assert probed(tar_of("disk.img", tarfile.PAX_FORMAT)) == "tar"
    assert probed(old_tar()) == "tar"
    skippable = struct.pack("<II", 0x184D2A53, 4) + b"abcd"
    assert probed(skippable + MADE["zstd"]) == "zstd"


PROGRAMS = {
    "lz4": ["lz4", "{source}", "{target}"],
    "lzop": ["lzop", "-o", "{target}", "{source}"],
    "lzip": ["lzip", "-k", "-o", "{target}", "{source}"],
    "7z": ["7zz", "a", "{target}.7z", "{source}"],
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_what_other_programs_make(tmp_path: Path, kind: str) -> None:
    program = PROGRAMS[kind][0]
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    source, target = tmp_path / "disk.img", tmp_path / "packed"
    source.write_bytes(DISK)
    words = [word.format(source=source, target=target) for word in PROGRAMS[kind]]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    (made,) = (each for each in tmp_path.iterdir() if each != source)
    assert probed(made.read_bytes()) == kind


def test_android_sparse_image() -> None:
    header = struct.pack("<IHHHHIIII", 0xED26FF3A, 1, 0, 28, 12, 4096, 1, 1, 0)
    assert probed(header + struct.pack("<HHII", 0xCAC3, 0, 1, 12)) == "android-sparse"


@pytest.mark.parametrize(
    "head",
    [
        b"\x1f\x8b\x08\xff" + bytes(600),  # reserved flags
        b"\x1f\x8b\x07\0" + bytes(600),
        b"BZh91AY&SX" + bytes(600),
        b"x" * 600,
        b"disk.img".ljust(148, b"\0") + b"0000001\0" + bytes(500),  # not the checksum
        bytes(600),
        b"\xeb\x3c\x90MSDOS5.0" + bytes(600),
    ],
)
def test_what_is_a_disk(head: bytes) -> None:
    assert container(head, head[-512:]) is None
    assert probed(head) == "raw"


def test_the_kinds_are_all_described() -> None:
    for found in CONTAINERS.values():
        assert found.what.startswith(("a ", "an "))
        assert found.advice.format(*["x"] * found.advice.count("{}"))


@pytest.mark.parametrize("kind", ["xz", "ova"])
def test_the_commands_say_so(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "a file.img", tmp_path / "disk.qcow2"
    path.write_bytes(MADE[kind])
    for command in (("info", path), ("map", path), ("copy", "--no-progress", path, target)):
        done = imgfs(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert CONTAINERS[kind].what in done.stderr
        assert "'a file.img'" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not target.exists()
    raw = tmp_path / "as-it-is"
    assert imgfs("copy", "--no-progress", "-o", "format=raw", path, raw).returncode == 0
    assert raw.read_bytes() == MADE[kind]
