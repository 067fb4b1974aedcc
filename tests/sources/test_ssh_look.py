"""Files behind ssh that are looked at, and opened only when they are read."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from imgfs.errors import NotAnImage, SourceChanged, SourceNotFound
from imgfs.sources.ssh import helper as ssh_helper
from imgfs.sources.ssh.source import SshHosts, SshSource
from tests.servers.ssh import Sshd

from .conftest import MIB, run, url_of
from .test_ssh_extents import true_extents

Use = Callable[[SshHosts, SshSource], Awaitable[None]]


def looked_at(sshd: Sshd, path: Path, use: Use, **changes: object) -> None:
    """The source, with a connection on which another file was opened before."""

    async def main() -> None:
        hosts = SshHosts()
        try:
            first = path.parent / "first"
            first.write_bytes(b"1")
            settings = sshd.settings(**changes)
            await hosts.open(url_of(sshd, first), settings)
            await use(hosts, await hosts.open(url_of(sshd, path), settings))
        finally:
            await hosts.aclose()

    run(main)


def handles(sshd: Sshd, path: Path) -> int:
    """How many of the server's processes have it open."""
    links = (p for pid in sshd.pids() for p in Path(f"/proc/{pid}/fd").glob("*"))
    return sum(link.is_symlink() and link.readlink() == path for link in links)


@pytest.mark.parametrize("kind", ["python3", "perl", "qemu-img"])
def test_what_is_told_without_opening_it(sshd: Sshd, image: Path, kind: str) -> None:
    data = image.read_bytes()
    st = image.stat()

    async def use(hosts: SshHosts, source: SshSource) -> None:
        assert (handles(sshd, image) > 0) == (kind != "python3")
        assert source.stat.identity is not None
        token = f"{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}:{st.st_ctime_ns}"
        assert (source.stat.identity.kind, source.stat.identity.token) == ("stat", token)
        assert (source.size, source.stat.mtime_ns) == (st.st_size, st.st_mtime_ns)
        assert source.stat.mode == st.st_mode & 0o777
        assert await source.extents(0, source.size) == true_extents(image)
        assert (handles(sshd, image) > 0) == (kind != "python3")
        glimpse = source.glimpse
        assert (glimpse is not None) == (kind == "python3")
        if glimpse is not None:
            assert (glimpse.head, glimpse.tail) == (data[:1024], data[-512:])
        await source.check_identity()
        assert bytes(await source.read(MIB - 7, 99)) == data[MIB - 7 : MIB + 92]

    looked_at(sshd, image, use, helpers=(kind,))


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1023, 1025, 65537])
def test_small_files(sshd: Sshd, tmp_path: Path, size: int) -> None:
    path = tmp_path / "small"
    data = os.urandom(size)
    path.write_bytes(data)

    async def use(hosts: SshHosts, source: SshSource) -> None:
        glimpse = source.glimpse
        assert glimpse is not None and glimpse.is_right
        assert glimpse.read(0, min(size, 1024)) == data[:1024]
        assert glimpse.read(max(0, size - 512), min(size, 512)) == data[-512:]
        assert size <= 1024 or glimpse.read(0, size) is None
        assert await source.extents(0, size) == true_extents(path)
        assert await source.peek([(0, size), (size, 0)]) == [data, b""]
        assert bytes(await source.read(0, size)) == data

    looked_at(sshd, path, use)


def test_peeks(sshd: Sshd, image: Path) -> None:
    data = image.read_bytes()
    rng = random.Random(1)

    async def use(hosts: SshHosts, source: SshSource) -> None:
        for _ in range(20):
            ranges = []
            for _ in range(rng.randrange(1, 9)):
                offset = rng.randrange(len(data))
                ranges.append((offset, rng.randrange(min(9000, len(data) - offset))))
            before = source.counters.bytes_read
            found = await source.peek(ranges)
            assert found == [data[at : at + length] for at, length in ranges]
            assert source.counters.bytes_read - before == sum(length for _, length in ranges)
        await source.read(0, 1)
        assert await source.peek([(0, 1)]) is None  # it is open, and may be read

    looked_at(sshd, image, use)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


def replace(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    new.replace(path)


@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink])
@pytest.mark.parametrize("then", ["read", "peek", "check_identity"])
def test_changed_before_it_is_opened(
    sshd: Sshd, image: Path, change: Callable[[Path], None], then: str
) -> None:
    async def use(hosts: SshHosts, source: SshSource) -> None:
        change(image)
        if then == "peek" and change is Path.unlink:
            assert await source.peek([(0, 10)]) is None
            return
        with pytest.raises(SourceChanged):
            if then == "read":
                await source.read(0, 10)
            elif then == "peek":
                await source.peek([(0, 10)])
            else:
                await source.check_identity()
        if change is not Path.unlink:
            fresh = await hosts.open(url_of(sshd, image), sshd.settings())
            assert bytes(await fresh.read(0, 10)) == image.read_bytes()[:10]

    looked_at(sshd, image, use)


def test_what_is_no_image_is_refused_as_ever(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    async def use(hosts: SshHosts, source: SshSource) -> None:
        for path, error in (
            (tmp_path / "missing", SourceNotFound),
            (tmp_path, NotAnImage),
            (tmp_path / "pipe", NotAnImage),
        ):
            with pytest.raises(error):
                await hosts.open(url_of(sshd, path), sshd.settings())

    looked_at(sshd, image, use)


def let_lie(monkeypatch: pytest.MonkeyPatch, true: str, lie: str) -> None:
    """The helper's program, with that put for this."""
    command, program, name = ssh_helper.HELPERS["python3"]
    text = bytes.fromhex(program.decode()).decode()
    assert true in text
    changed = command, text.replace(true, lie).encode().hex().encode(), name
    monkeypatch.setitem(ssh_helper.HELPERS, "python3", changed)


@pytest.mark.parametrize(
    ("true", "lie"),
    [
        ('"b %o %d %s\\n"', '"c %o %d %s\\n"'),  # no such line
        ('"b %o %d %s\\n"', '"b %o %d zz %s\\n"'),
        ("os.pread(fd, 1024, 0)", "os.pread(fd, 99, 0)"),
        ("at - start]", "at - start, 1 << 60, 1]"),
        ("at - start]", "0]"),
        ("at - start]", "1]; start = 0; out.write('x' * (1 << 21))"),
        ('    out.write("b %o', '    sys.exit()\n    out.write("b %o'),
    ],
)
def test_a_helper_that_lies(
    sshd: Sshd, image: Path, monkeypatch: pytest.MonkeyPatch, true: str, lie: str
) -> None:
    """The file is then opened as without one."""
    let_lie(monkeypatch, true, lie)

    async def use(hosts: SshHosts, source: SshSource) -> None:
        assert source.glimpse is None
        assert bytes(await source.read(0, MIB)) == image.read_bytes()[:MIB]

    looked_at(sshd, image, use)


@pytest.mark.parametrize(
    ("true", "lie"),
    [
        ("os.pread(fd, n, at)", "os.pread(fd, n, at)[1:]"),
        ('"p %s\\n"', '"q %s\\n"'),
        ('"p %s\\n"', '"p !%s\\n"'),
        ('"p %s\\n"', '"p YQ== %s\\n"'),
    ],
)
def test_a_helper_that_lies_of_bytes(
    sshd: Sshd, image: Path, monkeypatch: pytest.MonkeyPatch, true: str, lie: str
) -> None:
    let_lie(monkeypatch, true, lie)

    async def use(hosts: SshHosts, source: SshSource) -> None:
        assert source.glimpse is not None
        assert await source.peek([(0, 100), (200, 100)]) is None
        assert bytes(await source.read(0, MIB)) == image.read_bytes()[:MIB]

    looked_at(sshd, image, use)
