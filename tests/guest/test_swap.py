"""Linux swap, as mkswap makes it: everything behind its first page is free."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.guest.tools import LONG, MIB, empty, free_of, look, put, run

SIGNATURE = 4096 - 10


@pytest.fixture
def area(tmp_path: Path) -> Path:
    path = empty(tmp_path / "swap", 4 * MIB + 1000)
    run("mkswap", "--label", "back yard", "--uuid", "6ea95a65-12a5-4b0e-9ca8-7b1c8f8a9d01", path)
    return path


def test_all_but_the_header(area: Path) -> None:
    guest = look(area)
    assert guest.whole is not None
    found = guest.whole.filesystem
    assert found is not None
    assert (found.kind, found.label, found.used) == ("swap", "back yard", 4096)
    assert found.uuid == "6ea95a65-12a5-4b0e-9ca8-7b1c8f8a9d01"
    assert found.size == 4 * MIB  # what is behind the last page is not of it
    assert free_of(guest) == [(4096, 4 * MIB)]


@pytest.mark.parametrize("page", [4096, 8192, 16384, 32768, 65536])
@pytest.mark.parametrize("order", ["little", "big"])
def test_page_sizes_and_endianness(tmp_path: Path, page: int, order: str) -> None:
    path = empty(tmp_path / "swap", 4 * MIB)
    run("mkswap", "--pagesize", str(page), path)
    if order == "big":
        put(path, 1024, struct.pack(">2I", 1, 4 * MIB // page - 1))
    assert free_of(look(path)) == [(page, 4 * MIB)]


def test_bad_pages_stay(area: Path) -> None:
    put(area, 1032, struct.pack("<I", 3))
    put(area, 1536, struct.pack("<3I", 7, 1, 8))
    assert free_of(look(area)) == [(2 * 4096, 7 * 4096), (9 * 4096, 4 * MIB)]


@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (1024, struct.pack("<I", 2), "version"),
        (1024, bytes(4), "version"),
        (1028, struct.pack("<I", 1024), "last_page 1024"),
        (1028, bytes(4), "last_page 0"),
        (1032, struct.pack("<I", 638), "nr_badpages 638"),
        (1032, b"\xff" * 4, "nr_badpages"),
        (1032, struct.pack("<I", 1), "a bad page"),
        (SIGNATURE, b"SWAP-SPACE", "version 0"),
        (8192 - 10, b"SWAPSPACE2", "2 pages"),
    ],
)
def test_what_cannot_be_is_left_whole(area: Path, offset: int, data: bytes, why: str) -> None:
    put(area, offset, data)
    guest = look(area)
    assert guest.whole is not None
    assert why in guest.whole.left_whole
    assert not guest.free


SLEEPING = [b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001"]


@pytest.mark.parametrize("signature", SLEEPING)
def test_a_sleeping_guest_keeps_all_of_its_disk(
    tmp_path: Path, area: Path, signature: bytes
) -> None:
    disk = empty(tmp_path / "disk", 20 * MIB)
    run("sfdisk", "--quiet", disk, stdin="label: gpt\nsize=8M\nsize=8M\n")
    raw = area.read_bytes()
    put(disk, MIB, raw)
    put(disk, 9 * MIB, raw)
    assert free_of(look(disk)) == [(MIB + 4096, 5 * MIB), (9 * MIB + 4096, 13 * MIB)]
    put(disk, 9 * MIB + SIGNATURE, signature)
    guest = look(disk)
    assert "partition 2 is a suspended swap" in guest.left_whole
    assert not guest.free
    put(disk, 9 * MIB + SIGNATURE, bytes(10))
    put(disk, 9 * MIB, b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c")  # TuxOnIce
    assert "partition 2 is a suspended swap" in look(disk).left_whole


def test_every_header_byte_may_be_anything(area: Path) -> None:
    raw = area.read_bytes()
    for offset in range(1024, 1036):
        for value in range(0, 256, 1 if LONG else 15):
            changed = bytearray(raw)
            changed[offset] = value
            guest = look(changed)
            assert not guest.free or guest.free[-1] <= 4 * MIB
