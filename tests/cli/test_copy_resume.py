"""`imgfs copy --resume`, and copies that cannot end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imgfs.checksums import checksum, encode_line, seed_of
from tests.cli.test_copy import copy, names, refused
from tests.images import fill, scatter
from tests.mounts import IMGFS, MIB
from tests.servers.nbd import Nbdkit
from tests.servers.ports import free_port
from tests.servers.ssh import Sshd

Servers = Callable[..., Any]
SIZE = 24 * MIB


@pytest.fixture
def slow(tmp_path: Path, servers: Servers) -> Callable[..., str]:
    """Makes the URL of an image that comes slowly."""

    def make(image: Path) -> str:
        rate = ("rate=48M", "burstiness=1")  # bits a second
        url: str = servers(Nbdkit, "--filter=rate", "file", image, *rate).url()
        return url

    return make


def interrupted(record: Path, *words: object) -> int:
    """Begin a copy, kill it once some of it is recorded as durable; up to which byte."""
    program = (
        "from imgfs.copying import batch, engine\n"
        "from imgfs.cli.main import main\n"
        "engine.DURABLE_S = 0.1\n"
        f"batch.Budget = lambda: engine.Budget({2 * MIB})\n"
        "main()\n"
    )
    command = [IMGFS[0], "-c", program, "copy", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 40
        while (mark := mark_of(record)) < 4 * MIB:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    return mark_of(record) or mark


def mark_of(record: Path) -> int:
    for path in record.glob("*"):
        lines = path.read_bytes().split(b"\n")[1:-1]
        return int(lines[-1].split()[-1]) if lines else 0
    return 0


def sealed(destination: object, *texts: bytes) -> bytes:
    """A record of these lines, as if imgfs had written it."""
    found, seed = b"", seed_of("copy", str(destination))
    for text in texts:
        found += encode_line(text, seed) + b"\n"
        seed = checksum(text, seed)
    return found


@pytest.mark.parametrize("where", ["file", "ssh", "nbd"])
def test_a_copy_that_was_killed_goes_on(
    out: Path, state: Path, sshd: Sshd, servers: Servers, slow: Callable[..., str], where: str
) -> None:
    image, target = out / "disk.img", out / "a.raw"
    scatter(image, 2 * SIZE, SIZE)
    options = ["-o", f"identity=x,{sshd.options}"]
    place = {"file": str(target), "ssh": sshd.url(target), "nbd": ""}[where]
    if where == "nbd":
        target.write_bytes(os.urandom(2 * SIZE))
        place = servers(Nbdkit, "file", target, write=True).url()
    url = slow(image)
    mark = interrupted(state, url, place, *options)
    assert 0 < mark < 2 * SIZE
    if where != "nbd":
        assert names(out) == ["a.raw.part", "disk.img"]
    # The same image by the same name, faster: what a server says of itself is in the URL alone.
    fast = servers_url(url, servers, image)
    done = copy(fast, place, *options, "--resume", "--verify", "--progress=json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    begun = next(event for event in events if event["event"] == "begin")
    assert begun["resumed"] > 0
    (note,) = (event["text"] for event in events if event["event"] == "note")
    assert re.search(r": goes on at [4-9][0-9.]* MiB$|: goes on at \d\d\.\d MiB$", note)
    assert target.read_bytes() == image.read_bytes()
    assert list(state.iterdir()) == []
    if where != "nbd":
        assert names(out) == ["a.raw", "disk.img"]


def servers_url(url: str, servers: Servers, image: Path) -> str:
    """Another server where the slow one was."""
    socket = Path(url.rpartition("socket=")[2])
    socket.unlink()
    fresh = servers(Nbdkit, "file", image)
    fresh.socket.rename(socket)
    return url


def test_what_cannot_go_on_starts_again(
    out: Path, state: Path, servers: Servers, slow: Callable[..., str]
) -> None:
    image, target, part = out / "disk.img", out / "a.raw", out / "a.raw.part"
    fill(image, SIZE)
    url = slow(image)
    interrupted(state, url, target, "-o", "identity=x")
    servers_url(url, servers, image)
    record = next(state.iterdir())
    written, kept = record.read_bytes(), part.stat().st_size

    def again(*words: object, left: bytes = written) -> str:
        target.unlink(missing_ok=True)
        record.write_bytes(left)
        said = copy(url, target, "--resume", *words).stderr
        assert target.read_bytes() == image.read_bytes()
        return said

    assert " were there" in again("-oidentity=x")
    assert f"{target}: starts at its beginning: what was written before" in again("-oidentity=x")
    assert "has changed since" in again("-oidentity=y")
    facts, *marks = (line[17:] for line in written.splitlines())
    part.write_bytes(bytes(kept))
    found = part.stat()
    token = b'"token": "%d:%d"' % (found.st_dev, found.st_ino)
    ours = re.sub(rb'"token": "[^"]*"', token, facts)
    nothing = sealed(target, ours, b"0")
    assert "nothing was recorded as durable yet" in again("-oidentity=x", left=nothing)
    # Of another place, or with a mark that nothing proves: it is copied again.
    elsewhere = sealed(out / "b.raw", ours, *marks)
    assert f"{record}: is damaged in line 1; " in again("-oidentity=x", left=elsewhere)
    more = nothing + sealed(target, ours, b"0", *marks).splitlines()[-1].replace(b"7", b"8")
    assert f"{record}: is damaged in line 3; " in again("-oidentity=x", left=more + b"\n")
    assert "in another format, or sparse" in again("-oidentity=x", "--sparse")
    assert "nothing tells whether the source is still the same" in again()
    other = sealed(target, facts.replace(b'"version"', b'"v"'), *marks)
    strange = sealed(target, b'{"x": 1}', b"5")
    for left in (b"", b"{", b'{"x": 1}\n5\n', b"7\n7\n", strange, other):
        assert "starts at its beginning" in again("-oidentity=x", left=left)
    assert kept == SIZE


def test_without_resume_it_starts_anew(out: Path, state: Path, slow: Callable[..., str]) -> None:
    image, target = out / "disk.img", out / "a.raw"
    fill(image, SIZE)
    interrupted(state, slow(image), target, "-o", "identity=x")
    with (out / "a.raw.part").open("r+b") as file:
        file.write(b"something else")
    copy(image, target)
    assert target.read_bytes() == image.read_bytes()


def test_two_at_one_place(out: Path, slow: Callable[..., str], state: Path) -> None:
    image = out / "disk.img"
    fill(image, 64 * MIB)  # or it is done before the second begins
    command = [*IMGFS, "copy", slow(image), str(out / "a.raw")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (out / "a.raw.part").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert "another imgfs copies there" in refused(image, out / "a.raw")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert names(out) == ["a.raw.part", "disk.img"]


@pytest.mark.parametrize("ignores", [signal.SIGUSR1, signal.SIGINT])
def test_terminated(
    out: Path, slow: Callable[..., str], sshd: Sshd, ignores: signal.Signals
) -> None:
    """Wherever it is at that moment; also in a background, where a shell has ^C ignored."""
    fill(out / "disk.img", 16 * MIB)
    for n in range(3):
        url = slow(out / "disk.img")  # nbdkit may end with a client that ends so
        place = sshd.url(out / f"{n}.raw")
        command = [*IMGFS, "copy", url, place, "-o", sshd.options, "--no-progress"]
        with subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(ignores, signal.SIG_IGN),
        ) as process:
            while not (out / f"{n}.raw.part").exists():
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(0.3 + n / 7)
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=20)[1] == ""
            assert process.returncode == 143


def test_a_source_that_changes(out: Path, sshd: Sshd, state: Path) -> None:
    image = out / "disk.img"
    fill(image, 8 * MIB)
    options = ["-o", sshd.options]
    program = (
        "import os, sys\n"
        "from imgfs.copying import engine\n"
        "from imgfs.cli.main import main\n"
        "run = engine.Move._piece\n"
        "async def piece(self, *rest):\n"
        f"    os.utime({str(image)!r})\n"
        "    await run(self, *rest)\n"
        "engine.Move._piece = piece\n"
        "main()\n"
    )
    words = [IMGFS[0], "-c", program, "copy", sshd.url(image), str(out / "a.raw"), *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "changed since it was opened" in done.stderr
    assert "a.raw" not in names(out)
    assert list(state.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "small"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "none", point], check=True)
    yield point
    subprocess.run(["umount", point], check=True)


@pytest.mark.parametrize("where", ["file", "ssh"])
def test_a_full_disk(small_disk: Path, out: Path, sshd: Sshd, where: str) -> None:
    fill(out / "a", 6 * MIB)
    place = small_disk / "a.raw"
    to = str(place) if where == "file" else sshd.url(place)
    said = refused(out / "a", to, "-o", sshd.options)
    assert "no space is left" in said
    assert said.endswith("; a.raw.part stays, for --resume")
    assert names(small_disk) == ["a.raw.part"]
    assert "a.raw" not in names(small_disk)


def test_a_server_that_is_not_there(sparse: Path, out: Path, sshd: Sshd) -> None:
    nowhere = f"ssh://root@127.0.0.1:{free_port()}/x.raw"
    assert "refused" in refused(sparse, nowhere, "-o", "timeout=2")
    assert "refused" in refused(nowhere, out / "a.raw", "-o", "timeout=2")
    done = copy(nowhere, sparse, f"{out}/", "-o", "timeout=2", code=1)
    assert "1 of 2 failed" in done.stderr
    assert names(out) == ["disk.raw"]
