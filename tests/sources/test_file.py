"""Images on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from imgfs._native import _map
from imgfs.errors import NotAnImage, SourceChanged, SourceNotFound
from imgfs.sources.local.file import open_file

from .conftest import MIB, run


def test_bytes_and_extents(image: Path) -> None:
    async def main() -> None:
        source = await open_file(str(image))
        assert bytes(await source.read(0, source.size)) == image.read_bytes()
        assert bytes(await source.read(MIB + 1, 3)) == image.read_bytes()[MIB + 1 : MIB + 4]
        found = await source.extents(0, source.size)
        ends, flags = _map.scan_file(source.store.fileno(), source.size)
        assert (found.ends, found.flags) == (ends, flags)
        assert found.stored_bytes() < 3 * MIB
        await source.check_identity()
        await source.aclose()

    run(main)


def test_without_extents_all_is_data(image: Path) -> None:
    async def main() -> None:
        source = await open_file(str(image), extents=False)
        assert (await source.extents(0, source.size)).stored_bytes() == source.size
        await source.aclose()

    run(main)


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    async def main() -> None:
        source = await open_file(str(tmp_path / "empty"))
        assert source.size == 0
        assert await source.read(0, 0) == b""
        await source.aclose()

    run(main)


def test_what_is_not_an_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    async def main() -> None:
        for name, error in (
            (".", NotAnImage),
            ("fifo", NotAnImage),
            ("no", SourceNotFound),
            ("fifo/x", SourceNotFound),
        ):
            with pytest.raises(error):
                await open_file(str(tmp_path / name))

    run(main)


@pytest.mark.parametrize("how", ["replace", "write", "delete", "truncate"])
def test_change_is_noticed(image: Path, how: str) -> None:
    async def main() -> None:
        source = await open_file(str(image))
        if how == "replace":
            image.with_name("new").write_bytes(image.read_bytes())
            image.with_name("new").replace(image)
        elif how == "write":
            with image.open("r+b") as file:
                file.write(b"x")
        elif how == "delete":
            image.unlink()
        else:
            os.truncate(image, MIB)
        with pytest.raises(SourceChanged):
            await source.check_identity()
        if how == "truncate":
            with pytest.raises(SourceChanged):
                await source.read(2 * MIB, 100)
        await source.aclose()

    run(main)


def test_name_of_any_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/\xff\n'\"$x")
    Path(name).write_bytes(b"abc")

    async def main() -> None:
        source = await open_file(name)
        assert bytes(await source.read(0, 3)) == b"abc"
        await source.aclose()

    trio.run(main)
