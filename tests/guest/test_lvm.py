"""Logical volumes as lvm2 makes them, and metadata that lies."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.guest.disk import Guest, Volume
from imgfs.guest.lvm_text import BadText, parse
from tests.guest.lvm2 import physical, rewritten
from tests.guest.tools import LONG, MIB, empty, free_of, look, put_file, run

START, PV = MIB, 24 * MIB  # the physical volumes lie one behind the other
EXTENT = MIB


def assembled(tmp_path: Path, paths: list[Path]) -> Path:
    """A disk with these as its partitions."""
    disk = empty(tmp_path / "disk", START + len(paths) * PV + MIB)
    lines = [
        f"start={(START + n * PV) // 512},size={PV // 512},type=lvm" for n in range(len(paths))
    ]
    run("sfdisk", "--quiet", disk, stdin="label: gpt\n" + "\n".join(lines) + "\n")
    for n, path in enumerate(paths):
        put_file(disk, START + n * PV, path)
    return disk


def volumes(guest: Guest) -> dict[str, Volume]:
    return {each.name: each for each in guest.volumes}


def extents(volume: Volume, devices: list[str]) -> list[tuple[str, int, int]]:
    """As lvs says them."""
    found = []
    for segment in volume.segments:
        for base in segment.stripes:
            number, rest = divmod(base - START, PV)
            first = (rest - MIB) // EXTENT
            last = first + segment.size // len(segment.stripes) // EXTENT - 1
            found.append((devices[number], first, last))
    return found


@pytest.mark.parametrize("seed", range(40 if LONG else 4))
def test_random_groups(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    paths = [empty(tmp_path / f"pv{n}", PV) for n in range(rng.randint(1, 4))]
    with physical(paths, tmp_path / "lock") as lvm:
        lvm("pvcreate", *lvm.devices)
        lvm(f"vgcreate -s {EXTENT}b the-group", *lvm.devices)
        for number in range(rng.randint(1, 6)):
            stripes = rng.randint(1, len(paths))
            striped = f"-i {stripes} -I {rng.choice([4, 64, 256])}k" if stripes > 1 else ""
            size = stripes * rng.randint(1, 3)
            try:
                lvm.create(f"-l {size} {striped} -n lv-{number}.x the-group")
                if rng.random() < 0.5:
                    lvm(f"lvextend -l +{size} the-group/lv-{number // 2}.x")
                if number and rng.random() < 0.2:
                    lvm(f"lvremove -y the-group/lv-{number // 2}.x")
            except AssertionError:  # no room, or it is gone
                continue
        wanted = lvm.extents()
        devices = lvm.devices
    found = volumes(look(assembled(tmp_path, paths)))
    assert {name: extents(each, devices) for name, each in found.items()} == {
        f"the--group-{name.replace('-', '--')}": places for name, places in wanted.items()
    }
    assert wanted


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two physical volumes; `plain` is on the first one, `long` on both, `wide` is striped."""
    folder = tmp_path_factory.mktemp("lvm")
    paths = [empty(folder / f"pv{n}", PV) for n in range(2)]
    with physical(paths, folder / "lock") as lvm:
        lvm("pvcreate", *lvm.devices)
        lvm(f"vgcreate -s {EXTENT}b vg", *lvm.devices)
        lvm.create("-l 4 -n plain vg")
        lvm.create("-l 10 -i 2 -I 64k -n wide vg")
        lvm.create("-l 20 -n long vg")
    return assembled(folder, paths).read_bytes()


@pytest.fixture
def disk(made: bytes) -> bytearray:
    return bytearray(made)


def changed(disk: bytearray, change: Callable[[str], str], pvs: tuple[int, ...] = (0, 1)) -> Guest:
    for n in pvs:
        rewritten(disk, START + n * PV, change)
    return look(disk)


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, text
        return text.replace(old, new, 1)

    return change


def test_what_is_in_them(tmp_path: Path, disk: bytearray) -> None:
    guest = look(disk)
    assert [each.content.holds for each in guest.partitions] == [("LVM2 physical volume",)] * 2
    for name in ("vg-plain", "vg-wide"):
        volume = volumes(guest)[name]
        area = empty(tmp_path / "swap", volume.size)
        run("mkswap", "-q", "--label", name, area)
        raw, at = area.read_bytes(), 0
        for segment in volume.segments:
            for start, end in segment.ranges():
                disk[start:end] = raw[at : at + end - start]
                at += end - start
        assert at == len(raw)
    guest = look(disk)
    for name in ("vg-plain", "vg-wide"):
        found = volumes(guest)[name].content.filesystem
        assert found is not None
        assert (found.kind, found.label) == ("swap", name)
    # Of the striped one the header is on the first stripe alone.
    stripes = sorted(volumes(guest)["vg-wide"].segments[0].stripes)
    plain = volumes(guest)["vg-plain"].segments[0].stripes[0]
    assert plain + 4 * MIB == stripes[0]
    assert free_of(guest) == [
        (plain + 4096, stripes[0]),
        (stripes[0] + 4096, stripes[0] + 5 * MIB),
        (stripes[1], stripes[1] + 5 * MIB),
    ]


LIES = [
    ("pe_count = 23", "pe_count = 24", "the extents of pv0 end at byte"),
    ("pe_start = 2048", "pe_start = 16", "overlap the metadata"),
    ("pe_start = 2048", "pe_start = 99999999999", "the extents of pv0 end"),
    ("extent_count = 4\n", "extent_count = 40\n", "uses extents"),
    ('"pv0", 0\n', '"pv0", 3\n', "belongs to two logical volumes"),
    ('"pv0", 0\n', '"pv0", 22\n', "uses extents 22 to 26 of pv0, of 23"),
    ('"pv0", 0\n', '"pv0", -1\n', "uses extents -1"),
    ("start_extent = 0", "start_extent = 1", "does not begin where"),
    ("segment_count = 1", "segment_count = 7", "has no segment2"),
    ("segment_count = 1", "segment_count = 0", "segment_count is 0"),
    ("extent_size = 2048", "extent_size = 0", "extent_size is 0"),
    ("extent_size = 2048", 'extent_size = "many"', "extent_size is 'many'"),
    ("extent_size = 2048", "extent_size = 99999999999999999999", "extent_size is"),
    ("stripe_count = 2", "stripe_count = 3", "3 stripes"),
    ("stripe_size = 128", "stripe_size = 0", "stripe_size is 0"),
    ("plain {", '"plain" {', "cannot be read"),
    ("plain {", "pl/ain {", "cannot be read"),
    ("plain {", f"{'p' * 200} {{", "is no name"),
    ("wide {", "plain {", "plain is there twice"),
]


@pytest.mark.parametrize(("old", "new", "why"), LIES)
def test_metadata_that_lies(disk: bytearray, old: str, new: str, why: str) -> None:
    guest = changed(disk, replaced(old, new))
    assert guest.volumes == ()
    assert why in guest.partitions[0].content.left_whole
    assert why in guest.partitions[1].content.left_whole


def test_checksums(disk: bytearray) -> None:
    (at,) = struct.unpack_from("<Q", disk, START + 4096 + 40)
    for offset, why in (
        (512 + 40, "the label at byte 512 has a wrong checksum"),
        (4096 + 100, "a header with a wrong checksum"),
        (4096 + 10, "has no header"),
        (4096 + at + 30, "its metadata has a wrong checksum"),
    ):
        kept = disk[START + offset]
        disk[START + offset] ^= 1
        guest = look(disk)
        assert why in guest.partitions[0].content.left_whole
        assert not any(each.segments for each in guest.volumes)
        disk[START + offset] = kept
    assert all(each.segments for each in look(disk).volumes)


def test_copies_that_differ(disk: bytearray) -> None:
    guest = changed(disk, lambda text: text.replace("seqno = ", "seqno = 1"), (1,))
    assert guest.volumes == ()
    assert "several versions" in guest.partitions[0].content.left_whole


def test_the_same_physical_volume_twice(disk: bytearray) -> None:
    disk[START + PV : START + 2 * PV] = disk[START : START + PV]
    guest = look(disk)
    assert guest.volumes == ()
    assert "is there 2 times" in guest.partitions[0].content.left_whole


def test_two_groups_of_one_name(disk: bytearray) -> None:
    """As where a machine's disk was copied into another one's."""
    rewritten(disk, START + PV, lambda text: text.replace('id = "', 'id = "x', 1))
    guest = look(disk)
    assert guest.volumes == ()
    assert "another group of the same name" in guest.partitions[0].content.left_whole


def test_a_physical_volume_on_another_disk(disk: bytearray) -> None:
    disk[START + PV : START + 2 * PV] = bytes(PV)
    found = volumes(look(disk))
    assert [name for name, each in found.items() if each.segments] == ["vg-plain"]
    assert "on another disk" in found["vg-long"].content.left_whole


def thing(kind: str, more: str) -> str:
    """A visible logical volume of that type."""
    return f"""
    built {{
        id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa"
        status = ["READ", "WRITE", "VISIBLE"]
        flags = []
        segment_count = 1
        segment1 {{
            start_extent = 0
            extent_count = 4
            type = "{kind}"
            {more}
        }}
    }}
"""


@pytest.mark.parametrize(
    ("kind", "more", "others"),
    [
        ("thin", 'thin_pool = "pool"\ntransaction_id = 0\ndevice_id = 1', ()),
        ("thin", 'thin_pool = "pool"\nexternal_origin = "plain"\ndevice_id = 1', ("plain",)),
        ("raid1", 'device_count = 2\nraids = ["m0", "plain", "m1", "long"]', ("plain", "long")),
        ("mirror", 'mirror_count = 2\nmirrors = ["plain", 0, "wide", 0]', ("plain", "wide")),
        ("cache", 'cache_pool = "wide"\norigin = "plain"', ("plain", "wide")),
        ("snapshot", 'chunk_size = 8\norigin = "plain"\ncow_store = "long"', ("plain", "long")),
        ("writecache", 'origin = "wide"', ("wide",)),
        ("vdo", 'vdo_pool = "wide"', ("wide",)),
        ("striped", 'stripe_count = 1\nstripes = ["long", 0]', ("long",)),
        ("striped+new", 'stripe_count = 1\nstripes = ["pv0", 0]', ()),
        ("zero", "", ()),
    ],
)
def test_what_is_built_of_others(
    disk: bytearray, kind: str, more: str, others: tuple[str, ...]
) -> None:
    at = "logical_volumes {\n"
    found = volumes(changed(disk, replaced(at, at + thing(kind, more))))
    assert not found["vg-built"].segments
    assert found["vg-built"].content.left_whole
    for name in ("plain", "wide", "long"):
        volume = found[f"vg-{name}"]
        assert bool(volume.segments) == (name not in others)
        if name in others:
            assert volume.content.left_whole == "built is built of it"


@pytest.mark.parametrize("status", ['"PVMOVE"', '"LOCKED"', '"MERGING"', '"anything"'])
def test_unknown_states(disk: bytearray, status: str) -> None:
    old = 'status = ["READ", "WRITE", "VISIBLE"]'
    found = volumes(changed(disk, replaced(old, old.replace("]", f", {status}]"))))
    assert sorted(bool(each.segments) for each in found.values()) == [False, True, True]


def test_hidden_ones_are_not_shown(disk: bytearray) -> None:
    old = 'status = ["READ", "WRITE", "VISIBLE"]'
    assert len(changed(disk, replaced(old, 'status = ["READ", "WRITE"]')).volumes) == 2


def test_a_missing_physical_volume(disk: bytearray) -> None:
    old = 'status = ["ALLOCATABLE"]\nflags = []'
    found = volumes(changed(disk, replaced(old, old.replace("[]", '["MISSING"]'))))
    assert not any(each.segments for name, each in found.items() if name != "vg-long")


def test_any_bytes_in_the_metadata(disk: bytearray) -> None:
    rng = random.Random(7)
    original = bytes(disk)
    for turn in range(2000 if LONG else 150):
        seconds = time.monotonic()
        if turn % 2:
            place = START + rng.choice([rng.randrange(512, 640), rng.randrange(4096, 4300)])
            disk[place] = rng.randrange(256)
        else:

            def change(text: str) -> str:
                where, length = rng.randrange(len(text)), rng.choice([0, 1, 1, 20])
                new = rng.choice(["", "}", "{", '"', "[", "9", "-1", "\n", "#", "pv1", "=", "\\"])
                return text[:where] + new + text[where + length :]

            for n in (0, 1):
                state = rng.getstate()
                rewritten(disk, START + n * PV, change)
                rng.setstate(state)
            rng.random()
        guest = look(disk)
        assert time.monotonic() - seconds < 3
        for volume in guest.volumes:
            for segment in volume.segments:
                for start, end in segment.ranges():
                    assert START < start < end <= START + 2 * PV
        for n in (0, 1):
            low = START + n * PV
            disk[low : low + MIB] = original[low : low + MIB]


names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,8}", fullmatch=True)
scalars = st.integers(-(10**15), 10**15) | st.text(
    st.characters(exclude_characters="\0"), max_size=9
)
sections = st.recursive(
    st.dictionaries(names, scalars | st.lists(scalars, max_size=4), max_size=4),
    lambda inner: st.dictionaries(names, scalars | inner, max_size=4),
    max_leaves=12,
)


def written(section: dict, depth: int = 0) -> str:
    lines = []
    for name, value in section.items():
        if isinstance(value, dict):
            lines.append(f"{name} {{ # a section\n{written(value, depth + 1)}}}\n")
        elif isinstance(value, list):
            lines.append(f"{name} = [{', '.join(map(scalar, value))}]\n")
        else:
            lines.append(f"{name}={scalar(value)}\n")
    return "\n".join(lines)


def scalar(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


@given(sections)
def test_the_text_is_read_as_it_was_written(section: dict) -> None:
    assert parse(written(section)) == section


@given(st.text('{}[]=", #\\a1\n', max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except BadText as exc:
        assert str(exc)


def test_deep_and_large_texts() -> None:
    with pytest.raises(BadText, match="nested"):
        parse("a {" * 1000)
    seconds = time.monotonic()
    assert len(parse("".join(f"a{n} = {n}\n" for n in range(50_000)))) == 50_000
    assert time.monotonic() - seconds < 2
