"""Chains of disks put together, against a model: disks with random pieces over random files."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs.budget import Budget
from imgfs.errors import CorruptImage, SourceChanged
from imgfs.formats.disk import Disk
from imgfs.pieces import Codec, Coded, PieceList, PieceListBuilder
from imgfs.sources.local.file import open_file
from imgfs.steps import Steps, read
from imgfs.views.decoded import DecodedView, Layer
from imgfs.views.raw import RawView
from imgfs.views.units import SHARE, Units

COUNT = 1000 if os.environ.get("IMGFS_TEST_LONG") else 100
UNIT = 40


class Striped(Disk):
    """Stripes of a few bytes; the file begins with a table, a byte a stripe: its kind."""

    format = "striped"
    STRIPE = 7

    def __init__(self, kinds: bytes) -> None:
        self.kinds = kinds
        self.size = len(kinds) * self.STRIPE

    def map(self, offset: int, length: int) -> Steps[PieceList]:
        first = offset // self.STRIPE
        last = min(len(self.kinds), -(-(offset + length) // self.STRIPE) + 1)
        table = yield from read(first, last - first)
        builder = PieceListBuilder(first * self.STRIPE)
        for index, kind in enumerate(table, first):
            end = builder.end + self.STRIPE
            where = len(self.kinds) + UNIT + index * self.STRIPE
            if kind == ord("b"):
                builder.below(end)
            elif kind == ord("z"):
                builder.zero(end)
            elif kind == ord("d"):
                builder.data(end, where)
            elif kind == ord("c"):
                builder.coded(end, len(self.kinds), Coded(Codec.ZLIB, UNIT, 64, index % 50))
            elif kind == ord("l"):
                builder.literal(b"literal")
            else:
                raise CorruptImage(f"stripe {index} is a {kind}")
        return builder.finish(builder.end)


@dataclass
class Made:
    disk: Striped
    file: bytes

    def content(self, below: bytes) -> bytes:
        found = b""
        unit = zlib.decompress(self.file[len(self.disk.kinds) :])[:64] if self.file else b""
        for index, kind in enumerate(self.disk.kinds):
            at = index * Striped.STRIPE
            where = len(self.disk.kinds) + UNIT + at
            found += {
                "b": below[at : at + 7].ljust(7, b"\0"),
                "z": bytes(7),
                "d": self.file[where : where + 7],
                "c": unit[index % 50 :][:7],
                "l": b"literal",
            }[chr(kind)]
        return found


@st.composite
def disks(draw: st.DrawFn) -> Made:
    kinds = draw(st.text("bbzddcl", min_size=1, max_size=30)).encode()
    unit = zlib.compress(draw(st.binary(min_size=4, max_size=4)) * 16).ljust(UNIT, b"\0")
    rest = bytes((i * 31 + len(kinds)) % 255 + 1 for i in range(len(kinds) * Striped.STRIPE))
    return Made(Striped(kinds), kinds + unit + rest)


async def opened(path: Path, content: bytes) -> RawView:
    path.write_bytes(content)
    return RawView(await open_file(str(path)))


@settings(max_examples=COUNT, deadline=None)
@given(
    chain=st.lists(disks(), min_size=1, max_size=4), base=st.binary(max_size=150), data=st.data()
)
def test_chain_equals_model(
    tmp_path_factory: pytest.TempPathFactory, chain: list[Made], base: bytes, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("chain")
    wanted = base
    for made in reversed(chain):
        wanted = made.content(wanted)

    async def main() -> None:
        layers = [
            Layer([await opened(directory / str(i), made.file)], made.disk)
            for i, made in enumerate(chain)
        ]
        layers.append(Layer([await opened(directory / "base", base)]))
        view = DecodedView("disk.raw", layers)
        assert view.size == len(wanted)
        for _ in range(4):
            start = data.draw(st.integers(0, view.size))
            end = data.draw(st.integers(start, view.size))
            assert await view.read(start, end - start) == wanted[start:end]
        await view.prepare()
        for extent in await view.extents(0, view.size):
            assert not extent.is_zero or not any(wanted[extent.start : extent.end])
        holes = sum(e.length for e in await view.extents(0, view.size) if e.is_zero)
        assert view.stored_bytes == view.size - holes
        assert await view.read(0, view.size) == wanted
        for layer in layers:
            await layer.files[0].source.aclose()

    trio.run(main)


def test_what_is_local_is_read_natively(tmp_path: Path) -> None:
    made = Made(Striped(b"dzl"), b"dzl" + bytes(UNIT) + b"x" * 21)

    async def main() -> None:
        view = DecodedView("d", [Layer([await opened(tmp_path / "f", made.file)], made.disk)])
        assert view.map.read(0, view.size) is None
        await view.prepare()
        assert view.map.read(0, view.size) == b"x" * 7 + bytes(7) + b"literal"
        ends, flags = view.map.extents(0, view.size)
        assert (list(ends), flags) == ([7, 14, 21], bytes([0, 3, 0]))

    trio.run(main)


def test_a_corrupt_stripe_harms_no_other(tmp_path: Path) -> None:
    file = b"d" * 40 + bytes(UNIT) + b"x" * 280
    disk = Striped(b"d" * 40)
    file = file[:30] + b"?" + file[31:]

    async def main() -> None:
        view = DecodedView("d", [Layer([await opened(tmp_path / "f", file)], disk)])
        assert await view.read(0, 70) == b"x" * 70
        with pytest.raises(CorruptImage, match="stripe 30 is a 63"):
            await view.read(200, 20)
        assert await view.read(35 * 7, 7) == b"x" * 7

    trio.run(main)


def test_a_file_below_that_changes(tmp_path: Path) -> None:
    top, base = Made(Striped(b"bd"), b"bd" + bytes(UNIT) + b"x" * 14), tmp_path / "base"

    async def main() -> None:
        layers = [Layer([await opened(tmp_path / "top", top.file)], top.disk)]
        layers.append(Layer([await opened(base, b"base" * 5)]))
        view = DecodedView("d", layers)
        await view.prepare()
        told: list[SourceChanged] = []
        view.when_stale(told.append)
        await view.check()
        base.write_bytes(b"other" * 4)
        with pytest.raises(SourceChanged, match="base: changed"):
            await view.check()
        assert len(told) == 1
        assert view.map.read(0, 14) is None
        with pytest.raises(SourceChanged, match="base: changed"):
            await view.read(7, 7)

    trio.run(main)


@pytest.mark.parametrize("limit", [1, 100])
def test_units_are_decompressed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    from imgfs.views import planned

    unit = zlib.compress(b"12345678" * 8).ljust(UNIT, b"\0")
    made = Made(Striped(b"c" * 8), b"c" * 8 + unit + bytes(56))
    calls = 0
    decode = planned.decode

    def counted(*args: object) -> bytes:
        nonlocal calls
        calls += 1
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(planned, "decode", counted)
    remembered = Units(Budget(SHARE * limit))
    monkeypatch.setattr(planned, "shared_units", lambda: remembered)

    async def main() -> None:
        view = DecodedView("d", [Layer([await opened(tmp_path / "f", made.file)], made.disk)])
        async with trio.open_nursery() as nursery:
            for offset in range(50):
                nursery.start_soon(view.read, offset, 6)
        assert await view.read(0, 56) == made.content(b"")

    trio.run(main)
    assert calls == 1
