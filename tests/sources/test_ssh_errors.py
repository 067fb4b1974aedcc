"""What goes wrong behind ssh: logins, names, servers that die, freeze and come back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from imgfs.errors import (
    AccessDenied,
    HostKeyError,
    ImgfsError,
    LoginRefused,
    NotAnImage,
    SourceChanged,
    SourceNotFound,
    SourceTimeout,
    SourceUnreachable,
    UsageError,
)
from imgfs.sources.ssh.source import SshHosts, SshSource
from imgfs.url.source import SshUrl
from tests.servers.ssh import Sshd

from .conftest import MIB, opened, run, url_of


def refused(server: Sshd, path: Path, error: type[ImgfsError], **settings: Any) -> str:
    """The one line that opening it is refused with."""

    async def main() -> str:
        with pytest.raises(error) as caught:
            async with opened(server, path, **settings):
                pass
        return str(caught.value)

    said: str = run(main)
    assert "\n" not in said
    return said


def make_key(path: Path, passphrase: str = "") -> Path:
    # PKCS8, because OpenSSH's own format with a passphrase needs the bcrypt package.
    form = ["-t", "ecdsa", "-m", "PKCS8"] if passphrase else ["-t", "ed25519"]
    command = ["ssh-keygen", "-q", *form, "-N", passphrase, "-f", path]
    subprocess.run(command, check=True)
    return path


def test_host_key_wrong(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    public = Path(f"{make_key(tmp_path / 'other')}.pub").read_text()
    (tmp_path / "wrong").write_text(f"[127.0.0.1]:{sshd.port} {public}")
    said = refused(sshd, image, HostKeyError, known_hosts=str(tmp_path / "wrong"))
    assert "ANOTHER ONE than is known" in said
    assert "connect once" not in said


def test_host_key_unknown(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    for text in ("", "elsewhere.example ", "[127.0.0.1]:1 "):
        public = Path(f"{make_key(tmp_path / f'other{len(text)}')}.pub").read_text()
        (tmp_path / "none").write_text(text and text + public)
        said = refused(sshd, image, HostKeyError, known_hosts=str(tmp_path / "none"))
        assert "connect once with ssh, or name a file with -o known_hosts=" in said


def test_known_hosts_missing(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    said = refused(sshd, image, UsageError, known_hosts=str(tmp_path / "none"))
    assert str(tmp_path / "none") in said


def test_login_refused(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    key = make_key(tmp_path / "other")
    assert "key=" in refused(sshd, image, LoginRefused, identity=str(key))


def test_key_is_missing_or_encrypted(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    assert "nokey" in refused(sshd, image, UsageError, identity=str(tmp_path / "nokey"))
    key = make_key(tmp_path / "locked", "secret")
    said = refused(sshd, image, LoginRefused, identity=str(key))
    assert f"passphrase of {key}; load it into the agent" in said


def test_passphrase_is_asked_for_once(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    key = make_key(tmp_path / "locked", "secret")
    public = Path(f"{key}.pub").read_text()
    with (sshd.directory / "authorized").open("a") as file:
        file.write(public)
    asked: list[str] = []

    def prompt(question: str) -> str:
        asked.append(question)
        return "secret"

    async def main() -> None:
        async with opened(sshd, image, identity=str(key), prompt=prompt) as source:
            sshd.kill_sessions()
            assert bytes(await source.read(0, 9)) == image.read_bytes()[:9]

    run(main)
    assert len(asked) == 1
    assert "locked" in asked[0]


def test_missing_and_directory_and_fifo(sshd: Sshd, image: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(sshd, tmp_path / "missing", SourceNotFound)
    refused(sshd, image / "below", SourceNotFound)
    assert "directory" in refused(sshd, tmp_path, NotAnImage)
    os.mkfifo(tmp_path / "fifo")
    refused(sshd, tmp_path / "fifo", NotAnImage)


def test_no_listener(sshd: Sshd, image: Path) -> None:
    sshd.stop()
    begun = time.monotonic()
    assert sshd.url(image) in refused(sshd, image, SourceUnreachable)
    assert time.monotonic() - begun < 5


def test_a_server_that_has_gone_is_told_of_the_file(sshd: Sshd, image: Path) -> None:
    """Of many images of one server `imgfs top` shows each its own last error."""

    async def main() -> None:
        async with opened(sshd, image, timeout_s=1) as source:
            sshd.stop()
            with pytest.raises(SourceUnreachable) as caught:
                await source.read(0, MIB)
            assert str(caught.value).startswith(f"{sshd.url(image)}: ")
            assert source.counters.last_error == str(caught.value)

    run(main)


def test_name_that_does_not_resolve(sshd: Sshd) -> None:
    async def main() -> None:
        hosts = SshHosts()
        url = SshUrl("root", "no-such-host.invalid", None, b"/x")
        with pytest.raises(SourceUnreachable, match="not found"):
            await hosts.open(url, sshd.settings())
        await hosts.aclose()

    run(main, 60)


def test_no_ssh_server_at_all(sshd: Sshd, image: Path) -> None:
    """Something that takes connections and says nothing."""

    async def main() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        hosts = SshHosts()
        begun = time.monotonic()
        with pytest.raises(SourceTimeout):
            url = SshUrl("root", "127.0.0.1", port, b"/x")
            await hosts.open(url, sshd.settings(timeout_s=1))
        assert time.monotonic() - begun < 3
        await hosts.aclose()
        await listener.aclose()

    run(main)


def test_no_sftp(make_sshd: Callable[..., Sshd], image: Path) -> None:
    server = make_sshd(Subsystem="other /bin/false")
    refused(server, image, ImgfsError, timeout_s=3)


def test_without_home(sshd: Sshd, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USER", "LOGNAME", "SSH_AUTH_SOCK"):
        monkeypatch.delenv(name, raising=False)

    async def main() -> None:
        async with opened(sshd, image) as source:
            assert len(await source.read(0, 10)) == 10

    run(main)


def test_sessions_killed_while_reading(sshd: Sshd, image: Path) -> None:
    """Reads go on over a new connection, with the right bytes."""
    data = image.read_bytes()

    async def main() -> None:
        async with opened(sshd, image, timeout_s=10) as source:
            for _ in range(3):
                async with trio.open_nursery() as nursery:

                    async def read(offset: int) -> None:
                        found = await source.read(offset, MIB)
                        assert bytes(found) == data[offset : offset + MIB]

                    for n in range(28):
                        nursery.start_soon(read, n * MIB // 4)
                    await trio.sleep(0.005)
                    sshd.kill_sessions()

    run(main)


def test_server_dead_then_back(sshd: Sshd, image: Path) -> None:
    data = image.read_bytes()

    async def main() -> None:
        async with opened(sshd, image, timeout_s=1) as source:
            await trio.to_thread.run_sync(sshd.stop)
            begun = time.monotonic()
            with pytest.raises(SourceUnreachable) as caught:
                await source.read(0, 10)
            assert 0.8 < time.monotonic() - begun < 4
            assert "127.0.0.1" in str(caught.value)
            with pytest.raises(SourceUnreachable):
                await source.check_identity()
            await trio.to_thread.run_sync(sshd.start)
            # The pause between attempts is at most two seconds.
            with trio.fail_after(5):
                while True:
                    try:
                        assert bytes(await source.read(0, 10)) == data[:10]
                        break
                    except SourceUnreachable:
                        await trio.sleep(0.1)

    run(main)


def test_server_back_within_the_timeout(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        async with opened(sshd, image, timeout_s=15) as source:
            await trio.to_thread.run_sync(sshd.stop)

            async def later() -> None:
                await trio.sleep(1)
                await trio.to_thread.run_sync(sshd.start)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(later)
                found = await source.read(MIB, 100)
                assert bytes(found) == image.read_bytes()[MIB : MIB + 100]

    run(main)


async def frozen_read(source: SshSource, limit_s: float) -> None:
    begun = time.monotonic()
    with pytest.raises(SourceTimeout):
        await source.read(0, 4 * MIB)
    assert time.monotonic() - begun < limit_s


def test_frozen_server(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        async with opened(sshd, image, timeout_s=1) as source:
            sshd.send(signal.SIGSTOP)
            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(100):
                        nursery.start_soon(frozen_read, source, 3)
                await frozen_read(source, 3)
                begun = time.monotonic()
                with pytest.raises(SourceUnreachable):
                    await source.check_identity()
                assert time.monotonic() - begun < 3
            finally:
                sshd.send(signal.SIGCONT)
            with trio.fail_after(8):
                while True:
                    try:
                        found = await source.read(MIB, 9)
                        break
                    except SourceUnreachable:
                        await trio.sleep(0.1)
            assert bytes(found) == image.read_bytes()[MIB : MIB + 9]

    run(main)


def test_cancelling_a_read_of_a_frozen_server(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        async with opened(sshd, image) as source:
            sshd.send(signal.SIGSTOP)
            try:
                begun = time.monotonic()
                with trio.move_on_after(0.2):
                    await source.read(0, 4 * MIB)
                assert time.monotonic() - begun < 1
            finally:
                sshd.send(signal.SIGCONT)
            assert bytes(await source.read(0, 9)) == image.read_bytes()[:9]

    run(main)


def test_closing_while_frozen_is_quick(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        try:
            async with opened(sshd, image) as source:
                sshd.send(signal.SIGSTOP)
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(source.read, 0, 4 * MIB)
                    await trio.sleep(0.2)
                    nursery.cancel_scope.cancel()
                begun = time.monotonic()
            assert time.monotonic() - begun < 3
        finally:
            sshd.send(signal.SIGCONT)

    run(main)


def test_a_dead_host_delays_no_other(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        hosts = SshHosts()

        async def stuck() -> None:
            with pytest.raises(SourceUnreachable):
                await hosts.open(SshUrl("root", "127.0.0.1", port, b"/x"), sshd.settings())

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(stuck)
            await trio.sleep(0.1)
            begun = time.monotonic()
            source = await hosts.open(url_of(sshd, image), sshd.settings())
            await source.read(0, MIB)
            assert time.monotonic() - begun < 3
            await hosts.aclose()
        await listener.aclose()

    run(main)


@pytest.mark.parametrize("settings", [{}, {"extents": False}, {"helpers": ("perl",)}])
@pytest.mark.parametrize("how", ["replace", "grow", "truncate", "delete"])
def test_change_is_noticed_by_reads_and_checks(
    sshd: Sshd, image: Path, how: str, settings: dict[str, Any]
) -> None:
    os.utime(image, (1_600_000_000, 1_600_000_000))

    async def main() -> None:
        async with opened(sshd, image, **settings) as source:
            assert len(await source.read(0, 10)) == 10
            change(image, how)
            with pytest.raises(SourceChanged):
                await source.read(2 * MIB, 3000)
            with pytest.raises(SourceChanged):
                await source.check_identity()
            with pytest.raises(SourceChanged):
                await source.extents(0, source.size)

    if settings.get("extents", True):
        run(main)
    else:

        async def coarse() -> None:
            async with opened(sshd, image, **settings) as source:
                change(image, how)
                with pytest.raises(SourceChanged):
                    await source.read(2 * MIB, 3000)
                with pytest.raises(SourceChanged):
                    await source.check_identity()

        run(coarse)


def change(path: Path, how: str) -> None:
    if how == "replace":
        new = path.with_name("new")
        new.write_bytes(os.urandom(path.stat().st_size))
        new.replace(path)
    elif how == "grow":
        with path.open("ab") as file:
            file.write(b"more")
    elif how == "truncate":
        os.truncate(path, MIB)
    else:
        path.unlink()


def test_only_the_helper_sees_a_change_that_keeps_size_and_mtime(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        async with opened(sshd, image) as source:
            st = image.stat()
            change(image, "replace")
            os.utime(image, ns=(st.st_atime_ns, st.st_mtime_ns))
            with pytest.raises(SourceChanged):
                await source.check_identity()

    run(main)


def test_replaced_while_the_connection_was_away(sshd: Sshd, image: Path) -> None:
    async def main() -> None:
        async with opened(sshd, image, timeout_s=10) as source:
            st = image.stat()
            change(image, "replace")
            os.utime(image, ns=(st.st_atime_ns, st.st_mtime_ns))
            sshd.kill_sessions()
            with pytest.raises(SourceChanged):
                await source.read(0, 10)

    run(main)


def test_helper_killed_is_not_a_change(sshd: Sshd, image: Path) -> None:
    """Without the helper this time, its identity of last time says nothing."""

    async def main() -> None:
        async with opened(sshd, image) as source:
            for pid in sshd.pids():
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"python3" in command:
                    os.kill(pid, signal.SIGKILL)
            await source.check_identity()
            await source.check_identity()
            assert bytes(await source.read(0, 9)) == image.read_bytes()[:9]

    run(main)


def test_no_permission(make_sshd: Callable[..., Sshd], image: Path) -> None:
    server = make_sshd(
        Subsystem="sftp internal-sftp", ForceCommand="internal-sftp -p stat,realpath"
    )
    refused(server, image, AccessDenied)
