"""Servers that imgfs starts itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from imgfs.errors import SourceChanged, UsageError, sole
from imgfs.sources.nbd.settings import NbdSettings
from imgfs.sources.nbd.source import NbdSource, open_command
from imgfs.url.nbd import NbdCommand

from .conftest import MIB, run


@asynccontextmanager
async def started(directory: Path, *words: object, **settings: Any) -> AsyncIterator[NbdSource]:
    command = NbdCommand(tuple(map(str, words)))
    try:
        async with trio.open_nursery() as nursery:
            source = await open_command(command, directory, NbdSettings(**settings), nursery)
            try:
                yield source
            finally:
                await source.aclose()
    except BaseExceptionGroup as group:
        raise sole(group) from None


def process_of(source: NbdSource) -> int:
    assert source._command is not None
    assert source._command._running is not None
    return source._command._running.process.pid


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 5
    while is_alive(pid):
        assert time.monotonic() < deadline, pid
        time.sleep(0.01)


def temporary() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("imgfs-*")}


@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd", "through a shell"])
def test_bytes_extents_and_the_end(image: Path, tmp_path: Path, kind: str) -> None:
    qcow2 = tmp_path / "disk.qcow2"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, qcow2]
    subprocess.run(convert, check=True, capture_output=True)
    words = {
        "nbdkit": ["nbdkit", "-r", "file", image.name],
        "qemu-nbd": ["qemu-nbd", "-r", "-t", "-e", 4, "-f", "qcow2", qcow2],
        "through a shell": ["sh", "-c", f"exec nbdkit -r file {image.name}"],
    }[kind]
    data = image.read_bytes()
    before = temporary()

    async def main() -> int:
        async with started(image.parent, *words) as source:
            assert temporary() == before  # the socket has no name any more
            assert source.stat.identity is None
            assert bytes(await source.read(0, len(data))) == data
            assert (await source.extents(0, source.size)).stored_bytes() < source.size
            await trio.sleep(0.2)
            if kind == "nbdkit":
                assert len(source._link._alive) == 4
            pid = process_of(source)
            assert is_alive(pid)
            return pid

    assert not is_alive(run(main))


def test_what_cannot_be_started(image: Path, tmp_path: Path) -> None:
    cases: list[tuple[list[str], str]] = [
        (["nbdkit", "file", "no-such.img"], "no-such.img"),
        (["no-such-program"], "No such file"),
        (["false"], "status 1"),
        (["sh", "-c", "echo 'the reason' >&2; exit 3"], "the reason"),
    ]

    async def main() -> None:
        for words, said in cases:
            begun = trio.current_time()
            with pytest.raises(UsageError, match=said) as caught:
                async with started(tmp_path, *words):
                    pass
            assert "\n" not in str(caught.value)
            assert trio.current_time() - begun < 4
        with pytest.raises(UsageError, match="cannot be started"):
            async with started(tmp_path / "none", "nbdkit", "null"):
                pass

    run(main)


def test_arguments_are_no_shell_words_and_not_in_messages(image: Path) -> None:
    odd = image.with_name("a b; $(x) 'é.img")
    image.rename(odd)

    async def main() -> None:
        async with started(odd.parent, "nbdkit", "-r", "file", odd.name) as source:
            assert source.size == odd.stat().st_size
            assert source.url == "nbd+command:nbdkit"

    run(main)


def test_pins_of_two_commands_differ(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            started(tmp_path, "nbdkit", "-r", "memory", "1M", pin="v1") as one,
            started(tmp_path, "nbdkit", "-r", "pattern", "1M", pin="v1") as other,
            started(tmp_path, "nbdkit", "-r", "memory", "1M", pin="v1") as again,
        ):
            assert one.url == other.url
            assert one.stat.identity == again.stat.identity != other.stat.identity

    run(main)


@pytest.mark.parametrize("pin", [None, "v1"])
def test_killed_server_is_started_again(image: Path, pin: str | None) -> None:
    async def main() -> None:
        async with started(image.parent, "nbdkit", "-r", "file", image.name, pin=pin) as source:
            first = process_of(source)
            os.kill(first, signal.SIGKILL)
            await trio.to_thread.run_sync(wait_until_gone, first)
            if pin is None:
                with pytest.raises(SourceChanged):
                    await source.read(MIB, 100)
            else:
                assert bytes(await source.read(MIB, 100)) == image.read_bytes()[MIB : MIB + 100]
                assert process_of(source) != first

    run(main)


def test_stubborn_server_is_killed(tmp_path: Path) -> None:
    words = ["sh", "-c", "trap '' TERM; exec nbdkit -r null 1M"]

    async def main() -> int:
        async with started(tmp_path, *words) as source:
            pid = process_of(source)
            os.kill(pid, signal.SIGSTOP)
            return pid

    assert not is_alive(run(main))


def test_ends_when_imgfs_is_killed(image: Path) -> None:
    script = f"""
import sys, trio
from pathlib import Path
from imgfs.sources.nbd.source import open_command
from imgfs.sources.nbd.settings import NbdSettings
from imgfs.url.nbd import NbdCommand

async def main():
    async with trio.open_nursery() as nursery:
        words = NbdCommand(("nbdkit", "-r", "file", {image.name!r}))
        source = await open_command(words, Path({str(image.parent)!r}), NbdSettings(), nursery)
        # A worker thread that ends must not take the server along.
        await trio.to_thread.run_sync(int)
        print(source._command._running.process.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        time.sleep(0.2)
        assert is_alive(pid)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    wait_until_gone(pid)
