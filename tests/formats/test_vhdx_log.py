"""Logs of VHDX files, replayed in memory: against what qemu makes of the same files."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.errors import CorruptImage, UnsupportedFeature
from imgfs.formats import vhdx_tables as vt
from imgfs.formats.vhdx import open_disk
from imgfs.formats.vhdx_log import Change, replayed
from imgfs.pieces import PieceListBuilder
from imgfs.steps import Read
from tests.drive import Bytes, Files, size_of
from tests.formats import qemu
from tests.formats.vhdx_files import LOG_GUID, log_entry, set_log

MIB = 1 << 20
SIZE = 40 * MIB
OTHER_GUID = b"O" * 16


def content(file: Bytes) -> bytes:
    files = Files(file)
    disk = files.run(open_disk("a.vhdx", size_of(file)))
    return files.read(disk, 0, disk.size)


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[bytearray, list[tuple[int, bytes]], bytes, bytes]:
    """A file whose last changes of the BAT are not in it, those, and the disk before and after."""
    path = tmp_path / "made.vhdx"
    qemu.img("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, str(SIZE))
    qemu.io(path, "vhdx", "write -P 1 0 3M", "write -P 2 30M 1M")
    old, before = path.read_bytes(), qemu.raw(path, "vhdx")
    qemu.io(path, "vhdx", "write -P 3 4M 2M", "write -P 4 20M 5M")
    new, after = path.read_bytes(), qemu.raw(path, "vhdx")
    file, changes = bytearray(new), []
    for region in vt.regions(new[192 << 10 : 256 << 10]) or []:
        for at in range(region.file_offset, region.file_offset + region.length, 4096):
            if old[at : at + 4096] != new[at : at + 4096]:
                changes.append((at, new[at : at + 4096]))
                file[at : at + 4096] = old[at : at + 4096]
    assert changes
    assert before != after
    return file, changes, before, after


def by_qemu(file: bytes, tmp_path: Path) -> bytes:
    """The disk after qemu has replayed the log, of a copy."""
    path = tmp_path / "replayed.vhdx"
    path.write_bytes(file)
    qemu.img("check", "-q", "-r", "all", "-f", "vhdx", path)
    return qemu.raw(path, "vhdx")


def place(log: bytearray, at: int, *entries: bytes) -> None:
    """Put the entries there, one after the other, around the end if need be."""
    for entry in entries:
        for start in range(0, len(entry), 4096):
            log[at : at + 4096] = entry[start : start + 4096]
            at = (at + 4096) % len(log)


Interrupted = tuple[bytearray, list[tuple[int, bytes]], bytes, bytes]


@pytest.mark.parametrize("at", [0, 64 << 10, MIB - 4096])
def test_one_entry(tmp_path: Path, interrupted: Interrupted, at: int) -> None:
    file, changes, _, after = interrupted
    log = bytearray(MIB)
    place(log, at, log_entry(7, at, changes, len(file)))
    set_log(file, bytes(log))
    assert content(bytes(file)) == after
    if at == 0:  # qemu does not follow an entry around the end
        assert by_qemu(bytes(file), tmp_path) == after


def test_the_rest_of_what_is_in_a_log(tmp_path: Path, interrupted: Interrupted) -> None:
    """Older sequences, entries of another log, and half of an entry count for nothing."""
    file, changes, _, after = interrupted
    wrong = [(at, b"w" * 4096) for at, _ in changes]
    log, size = bytearray(MIB), len(file)
    place(log, 0, log_entry(3, 0, wrong, size), log_entry(4, 0, wrong, size))
    place(log, 128 << 10, log_entry(90, 128 << 10, wrong, size, OTHER_GUID))
    place(log, 256 << 10, log_entry(10, 256 << 10, wrong, size))
    second = (256 << 10) + len(log_entry(10, 0, wrong, size))
    place(log, second, log_entry(11, 256 << 10, changes, size))
    third = second + len(log_entry(11, 0, changes, size))
    torn = bytearray(log_entry(12, 256 << 10, wrong, size))
    torn[-1] ^= 1
    place(log, third, bytes(torn))
    set_log(file, bytes(log))
    assert content(bytes(file)) == after
    assert by_qemu(bytes(file), tmp_path) == after


def test_only_from_the_tail_on(interrupted: Interrupted) -> None:
    file, changes, _, after = interrupted
    wrong = [(vt.REGION_TABLE_OFFSETS[0], b"w" * 4096)]
    first = log_entry(5, 0, wrong, len(file))
    log = bytearray(MIB)
    place(log, 0, first, log_entry(6, len(first), changes, len(file)))
    set_log(file, bytes(log))
    assert content(bytes(file)) == after


def test_a_sequence_without_its_tail_is_none(interrupted: Interrupted) -> None:
    file, changes, before, _ = interrupted
    log = bytearray(MIB)
    place(log, 0, log_entry(5, 512 << 10, changes, len(file)))
    set_log(file, bytes(log))
    assert content(bytes(file)) == before


@pytest.mark.parametrize("guid", [OTHER_GUID, vt.NO_GUID])
def test_a_log_of_another_guid(tmp_path: Path, interrupted: Interrupted, guid: bytes) -> None:
    file, changes, before, _ = interrupted
    log = bytearray(MIB)
    place(log, 0, log_entry(7, 0, changes, len(file)))
    set_log(file, bytes(log), guid)
    assert content(bytes(file)) == before
    assert by_qemu(bytes(file), tmp_path) == before


def test_zeroes_and_bytes_of_the_disk(tmp_path: Path, interrupted: Interrupted) -> None:
    """A log may say anything of the file: here also of the blocks."""
    file, changes, _, after = interrupted
    log, size = bytearray(MIB), len(file)
    entry = next(v for (v,) in struct.iter_unpack("<Q", file[vt_bat(file) :][:8]))
    block = entry & ~(MIB - 1)
    first = log_entry(1, 0, [*changes, (block, b"x" * 4096), (block + 8192, 16384)], size)
    second = log_entry(2, 0, [(block + 12288, b"y" * 4096), (block + 65536, 65536)], size)
    place(log, 0, first, second)
    set_log(file, bytes(log))
    found = content(bytes(file))
    assert found[:4096] == b"x" * 4096
    assert found[8192:24576] == bytes(4096) + b"y" * 4096 + bytes(8192)
    assert found[131072:] == after[131072:]
    assert found == by_qemu(bytes(file), tmp_path)


def vt_bat(file: bytes | bytearray) -> int:
    found = vt.regions(bytes(file[192 << 10 : 256 << 10]))
    assert found is not None
    return next(region.file_offset for region in found if region.guid == vt.BAT_REGION)


def test_a_log_makes_the_file_longer(interrupted: Interrupted) -> None:
    file, changes, _, after = interrupted
    whole = len(file)
    entry = log_entry(1, 0, changes, whole)
    header = vt.log_entry(entry)._replace(checksum=0, flushed_file_offset=whole - MIB)
    entry = vt.with_checksum(header.pack() + entry[vt.LOG_ENTRY_HEADER_SIZE :])
    log = bytearray(MIB)
    place(log, 0, entry)
    set_log(file, bytes(log))
    del file[whole - MIB :]
    found = content(bytes(file))
    lost = [at for at in range(0, SIZE, MIB) if found[at : at + MIB] != after[at : at + MIB]]
    assert len(lost) == 1
    assert found[lost[0] : lost[0] + MIB] == bytes(MIB)


def test_a_truncated_file(interrupted: Interrupted) -> None:
    file, changes, _, _ = interrupted
    log = bytearray(MIB)
    place(log, 0, log_entry(1, 0, changes, len(file) + 1))
    set_log(file, bytes(log))
    with pytest.raises(CorruptImage, match="is truncated: it had"):
        content(bytes(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_version": 1}, "log's version is 1"),
        ({"log_length": 1 << 30}, "log of 1073741824 bytes"),
        ({"log_length": 5000}, "length 5000 is no multiple"),
        ({"log_offset": 4096}, "offset 4096"),
        ({"log_offset": 1 << 50}, "is past the end"),
    ],
)
def test_an_absurd_log(interrupted: Interrupted, changes: dict[str, int], message: str) -> None:
    file = interrupted[0]
    for at in vt.HEADER_OFFSETS:
        header = vt.header(file[at : at + 4096])._replace(checksum=0, log_guid=LOG_GUID, **changes)
        file[at : at + 4096] = header.pack()
    with pytest.raises((CorruptImage, UnsupportedFeature), match=message):
        content(bytes(file))


CHANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans()), max_size=8)


@given(CHANGES, st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_changes_of_a_file(
    made: list[tuple[int, int, bool]], more: int, offset: int, length: int
) -> None:
    rng = random.Random(1)
    stored, size = bytes(range(100, 120)), 20 + more
    wanted = bytearray(stored.ljust(size, b"\0"))
    changes = []
    for start, span, is_zero in made:
        data = bytes(span) if is_zero else rng.randbytes(span)
        changes.append(Change(start, start + span, None if is_zero else data))
        wanted[start : start + span] = data[: max(0, size - start)]
    del wanted[size:]
    file = replayed(len(stored), size, changes)
    files = Files(stored)
    assert files.run(file.read_all([Read(offset, length)])) == [wanted[offset : offset + length]]
    if offset < size:
        builder, length = PieceListBuilder(1000), min(length, size - offset)
        file.append(builder, 1000 + length, offset)
        pieces = builder.finish(1000 + length)
        assert files.content(pieces, 1000, length) == wanted[offset : offset + length]
