"""Reading through a real sshd."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from imgfs.sources.ssh.handles import MOST_OPEN
from imgfs.sources.ssh.link import SshLink
from imgfs.sources.ssh.source import SshHosts, SshSource
from tests.servers.ssh import Sshd

from .conftest import MIB, opened, run, url_of


def test_bytes(sshd: Sshd, image: Path) -> None:
    data = image.read_bytes()

    async def main() -> None:
        async with opened(sshd, image) as source:
            assert source.size == len(data)
            assert source.name == "disk.img"
            assert source.stat.mtime_ns == image.stat().st_mtime_ns
            assert source.stat.mode == image.stat().st_mode & 0o777
            assert bytes(await source.read(0, source.size)) == data
            chooser = random.Random(1)
            for _ in range(50):
                offset = chooser.randrange(len(data))
                length = chooser.randrange(min(MIB, len(data) - offset) + 1)
                assert bytes(await source.read(offset, length)) == data[offset : offset + length]

    run(main)


def test_concurrent_reads_of_two_images(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(os.urandom(5 * MIB))

    async def main() -> None:
        async with opened(sshd, image) as a, opened(sshd, other) as b:

            async def check(source: object, path: Path, offset: int) -> None:
                length = min(MIB, path.stat().st_size - offset)
                found = await source.read(offset, length)  # type: ignore[attr-defined]
                assert bytes(found) == path.read_bytes()[offset : offset + length]

            async with trio.open_nursery() as nursery:
                for offset in range(0, 5 * MIB, MIB // 2):
                    nursery.start_soon(check, a, image, offset)
                    nursery.start_soon(check, b, other, offset)

    run(main)


def test_images_of_a_host_share_a_connection(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        hosts = SshHosts()
        url, settings = url_of(sshd, image), sshd.settings()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(hosts.open, url, settings)
        await hosts.aclose()

    run(main)
    assert (sshd.directory / "log").read_text().count("Accepted publickey") == 1


def test_cancelled_reads_disturb_nobody(sshd: Sshd, image: Path) -> None:
    data = image.read_bytes()

    async def main() -> None:
        async with opened(sshd, image, depth=4) as source:

            async def cancelled(n: int) -> None:
                with trio.move_on_after(n / 5000):
                    await source.read(0, 4 * MIB)

            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    for n in range(20):
                        nursery.start_soon(cancelled, n)
                assert bytes(await source.read(MIB, MIB)) == data[MIB : 2 * MIB]

    run(main)


def test_home_relative(sshd: Sshd, image: Path) -> None:
    relative = os.path.relpath(image, Path.home())
    url = f"ssh://root@127.0.0.1:{sshd.port}/~/{relative}"

    async def main() -> None:
        from imgfs.url.source import SshUrl, parse

        parsed = parse(url)
        assert isinstance(parsed, SshUrl)
        hosts = SshHosts()
        source = await hosts.open(parsed, sshd.settings())
        assert bytes(await source.read(0, 8192)) == image.read_bytes()[:8192]
        assert (await source.extents(0, source.size)).stored_bytes() < source.size
        await hosts.aclose()

    run(main)


def test_forced_internal_sftp(make_sshd: Callable[..., Sshd], image: Path) -> None:
    server = make_sshd(Subsystem="sftp internal-sftp", ForceCommand="internal-sftp")

    async def main() -> None:
        async with opened(server, image) as source:
            assert bytes(await source.read(MIB, MIB)) == image.read_bytes()[MIB : 2 * MIB]
            assert (await source.extents(0, source.size)).stored_bytes() == source.size
            assert source.stat.identity is not None
            assert source.stat.identity.kind == "sftp"
            await source.check_identity()

    run(main)


def test_ssh_config_is_used(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host kool\n HostName 127.0.0.1\n Port {sshd.port}\n User root\n"
        f" IdentityFile {sshd.directory / 'user'}\n UserKnownHostsFile {sshd.directory / 'known'}\n"
    )

    async def main() -> None:
        from imgfs.url.source import SshUrl

        hosts = SshHosts()
        url = SshUrl(None, "kool", None, os.fsencode(image))
        settings = sshd.settings(config=str(config), known_hosts=None, identity=None)
        source = await hosts.open(url, settings)
        assert bytes(await source.read(0, 10)) == image.read_bytes()[:10]
        await hosts.aclose()

    run(main)


def test_empty_image(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    async def main() -> None:
        async with opened(sshd, tmp_path / "empty") as source:
            assert source.size == 0
            assert await source.read(0, 0) == b""

    run(main)


def test_cipher_is_the_fast_one(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        hosts = SshHosts()
        source = await hosts.open(url_of(sshd, image), sshd.settings())
        (link,) = hosts._links.values()
        assert isinstance(link, SshLink)
        assert link._session is not None
        info = link._session._connection.get_extra_info("send_cipher")
        assert info == "aes128-gcm@openssh.com"
        assert link._session.read_size == 255 << 10
        await source.aclose()
        await hosts.aclose()

    run(main)


@pytest.mark.parametrize("length", [1, 255 << 10, (255 << 10) + 1, 3 * (255 << 10)])
def test_piece_boundaries(sshd: Sshd, image: Path, length: int) -> None:
    data = image.read_bytes()

    async def main() -> None:
        async with opened(sshd, image) as source:
            for offset in (0, 1, len(data) - length):
                assert bytes(await source.read(offset, length)) == data[offset : offset + length]

    run(main)


def test_many_files_do_not_use_up_the_servers_handles(sshd: Sshd, tmp_path: Path) -> None:
    count = MOST_OPEN + 60
    pool = tmp_path / "pool"
    pool.mkdir()
    for i in range(count):
        (pool / f"{i}.img").write_bytes(str(i).encode() * 100)

    def handles() -> int:
        """The most that a connection has; on a busy machine there may be several."""
        return max(handles_of(pid) for pid in sshd.pids())

    def handles_of(pid: int) -> int:
        links = Path(f"/proc/{pid}/fd").glob("*")
        return sum(
            str(link.readlink()).startswith(str(pool)) for link in links if link.is_symlink()
        )

    async def given_back() -> None:
        """It is done in the background."""
        with trio.fail_after(10):
            while handles() > MOST_OPEN:
                await trio.sleep(0.05)

    async def main() -> None:
        hosts = SshHosts()
        sources = []
        for i in range(count):
            url = url_of(sshd, pool / f"{i}.img")
            sources.append(await hosts.open(url, sshd.settings()))
        for source in sources:
            await source.read(0, 1)
        await given_back()
        assert handles() >= MOST_OPEN - 1
        async with trio.open_nursery() as nursery:
            for i, source in enumerate(sources):

                async def check(i: int = i, source: SshSource = source) -> None:
                    assert bytes(await source.read(0, source.size)) == str(i).encode() * 100

                nursery.start_soon(check)
        await given_back()
        await hosts.aclose()

    run(main, 100)
