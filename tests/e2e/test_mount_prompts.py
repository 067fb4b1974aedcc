"""Questions at the terminal: a pseudo-terminal, a real sshd, and a locked key."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgfs.daemon.mounts import mounted_at
from tests.mounts import IMGFS, imgfs
from tests.servers.ssh import Sshd

from .test_mount_signals import nothing_left, processes, wait_until

SECRET = "open sesame é"


class Terminal:
    """A command with a terminal of its own, and what a person there sees."""

    def __init__(self, *words: object, env: dict[str, str] | None = None) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            command = [*IMGFS, *map(str, words)]
            os.execve(command[0], command, {**os.environ, **(env or {})})
        self.pid = pid
        self.seen = ""

    def read_until(self, text: str, within_s: float = 20) -> None:
        end = time.monotonic() + within_s
        while text not in self.seen:
            assert self._read(end - time.monotonic()), self.seen

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.fd], [], [], max(0, timeout_s))[0]:
            return False
        try:
            data = os.read(self.fd, 4096)
        except OSError:  # nobody has it open any more
            return False
        self.seen += data.decode()
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.fd)[3] & termios.ECHO)

    def status(self) -> int:
        """Of the command that has ended; what it still said is read."""
        while self._read(20):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """It lets only a key in that has a passphrase."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    directory = tmp_path / "sshd"
    directory.mkdir()
    server = Sshd(directory)
    key = directory / "locked"
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-a", "4", "-N", SECRET, "-f", str(key)]
    subprocess.run(words, check=True)
    (directory / "authorized").write_bytes((directory / "locked.pub").read_bytes())
    yield server
    server.stop()


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "point"
    path.mkdir()
    yield path
    subprocess.run(["fusermount3", "-uzq", path], timeout=20, check=False, capture_output=True)


def options(sshd: Sshd) -> str:
    return f"known_hosts={sshd.directory / 'known'},key={sshd.directory / 'locked'}"


def tells_the_secret(pid: int) -> bool:
    process = Path(f"/proc/{pid}")
    return any(SECRET.encode() in (process / n).read_bytes() for n in ("cmdline", "environ"))


@pytest.mark.parametrize("public", [True, False], ids=["with .pub", "alone"])
def test_passphrase_then_the_background(
    point: Path, sshd: Sshd, sparse: Path, public: bool
) -> None:
    if not public:
        (sshd.directory / "locked.pub").unlink()
    t = Terminal("-vv", sshd.url(sparse), point, "-o", options(sshd))
    t.read_until(f"passphrase of {sshd.directory / 'locked'}: ")
    assert not t.echoes()
    t.type(SECRET + "\n")
    assert t.status() == 0
    assert t.seen.count("passphrase of") == 1
    assert SECRET not in t.seen
    (serving,) = processes(point)
    assert not tells_the_secret(serving)
    assert (point / "disk.raw").read_bytes() == sparse.read_bytes()
    # The connection is made again without a question.
    sshd.kill_sessions()
    fd = os.open(point / "disk.raw", os.O_RDONLY | os.O_DIRECT)
    assert len(os.pread(fd, 4096, 30 << 20)) == 4096
    os.close(fd)
    assert imgfs("umount", point).returncode == 0


def test_passphrase_in_the_foreground(point: Path, sshd: Sshd, sparse: Path) -> None:
    t = Terminal("-f", sshd.url(sparse), point, "-o", options(sshd))
    t.read_until("passphrase of")
    t.type(SECRET + "\n")
    wait_until(lambda: mounted_at(str(point)) is not None)
    assert (point / "disk.raw").read_bytes() == sparse.read_bytes()
    assert t.echoes()
    t.type("\x03")
    assert t.status() == 0
    nothing_left(point)


@pytest.mark.parametrize("typed", ["wrong\n", "\x04"], ids=["wrong", "end"])
@pytest.mark.parametrize("words", [["-f"], []], ids=["foreground", "background"])
def test_wrong_passphrase_is_one_line(
    point: Path, sshd: Sshd, sparse: Path, words: list[str], typed: str
) -> None:
    t = Terminal(sshd.url(sparse), point, "-o", options(sshd), *words)
    t.read_until("passphrase of")
    t.type(typed)
    assert t.status() == 1
    question, said, rest = t.seen.replace("\r", "").split("\n")
    assert question.endswith(": ")
    wanted = "needs a passphrase" if typed == "\x04" else "the passphrase of"
    assert wanted in said
    assert rest == ""
    nothing_left(point)


@pytest.mark.parametrize("by", ["key=", "config="])
def test_a_locked_key_without_a_terminal_is_named(
    point: Path, sshd: Sshd, sparse: Path, tmp_path: Path, by: str
) -> None:
    known, locked = sshd.directory / "known", sshd.directory / "locked"
    file = locked
    if by == "config=":
        file = tmp_path / "config"
        file.write_text(f"Host *\n  IdentityFile {locked}\n")
    command = [*IMGFS, sshd.url(sparse), point, "-o", f"known_hosts={known},{by}{file}"]
    done = subprocess.run(
        command, timeout=60, capture_output=True, text=True, start_new_session=True
    )
    assert done.returncode == 1
    refused = "the server refused the login, and " if by == "config=" else ""
    assert done.stderr == (
        f"imgfs: 127.0.0.1:{sshd.port}: {refused}there is no terminal to ask for the passphrase of "
        f"{locked}; load it into the agent with ssh-add\n"
    )
    nothing_left(point)


@pytest.mark.parametrize("words", [["-f"], []], ids=["foreground", "background"])
def test_interrupt_at_the_question(point: Path, sshd: Sshd, sparse: Path, words: list[str]) -> None:
    t = Terminal(sshd.url(sparse), point, "-o", options(sshd), *words)
    t.read_until("passphrase of")
    t.type("\x03")
    assert t.status() == 1
    assert "stopped by SIGINT" in t.seen
    assert "Traceback" not in t.seen
    nothing_left(point)


def test_terminal_shows_typing_again(point: Path, sshd: Sshd, sparse: Path) -> None:
    """Whoever ends the command, and while the question stands."""
    t = Terminal(sshd.url(sparse), point, "-o", options(sshd))
    t.read_until("passphrase of")
    assert not t.echoes()
    (serving,) = set(processes(point)) - {t.pid}
    os.kill(serving, signal.SIGTERM)
    wait_until(t.echoes)
    assert t.status() == 1
    assert "stopped by SIGTERM" in t.seen


def test_no_question_when_the_agent_has_the_key(
    point: Path, sshd: Sshd, sparse: Path, tmp_path: Path
) -> None:
    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    try:
        wait_until(socket.exists)
        env = {"SSH_AUTH_SOCK": str(socket)}
        unlocked = tmp_path / "unlocked"
        unlocked.write_bytes((sshd.directory / "locked").read_bytes())
        unlocked.chmod(0o600)
        change = ["ssh-keygen", "-q", "-p", "-P", SECRET, "-N", "", "-f", str(unlocked)]
        subprocess.run(change, check=True, capture_output=True)
        add = ["ssh-add", "-q", str(unlocked)]
        subprocess.run(add, check=True, env={**os.environ, **env}, capture_output=True)
        t = Terminal(sshd.url(sparse), point, "-o", options(sshd), env=env)
        assert (t.status(), t.seen) == (0, "")
        assert imgfs("umount", point).returncode == 0
    finally:
        agent.terminate()
        agent.wait(5)


def test_unknown_host_key_is_refused_unasked(
    point: Path, sshd: Sshd, sparse: Path, tmp_path: Path
) -> None:
    (tmp_path / "none").touch()
    words = f"known_hosts={tmp_path / 'none'},key={sshd.directory / 'locked'}"
    t = Terminal(sshd.url(sparse), point, "-o", words)
    assert t.status() == 1
    assert "host key is not trusted" in t.seen
    assert t.seen.count("\n") == 1


@pytest.fixture
def with_password(tmp_path: Path) -> Iterator[Sshd]:
    """Its own root has the password; nobody else sees this /etc/shadow."""
    directory = tmp_path / "password"
    directory.mkdir()
    make = ["openssl", "passwd", "-6", "-stdin"]
    hashed = subprocess.run(
        make, input=SECRET.encode() + b"\n", capture_output=True, check=True
    ).stdout.decode()
    shadow = directory / "shadow"
    shadow.write_text(f"root:{hashed.strip()}:19000:0:99999:7:::\n")
    script = f'mount --bind {shadow} /etc/shadow && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-c", script, "sh"]
    server = Sshd(directory, prefix, PermitRootLogin="yes", PubkeyAuthentication="no")
    yield server
    server.stop()


def test_password_and_a_second_try(point: Path, with_password: Sshd, sparse: Path) -> None:
    t = Terminal(with_password.url(sparse), point, "-o", with_password.options)
    t.read_until("password of root@127.0.0.1: ")
    t.type("wrong\n")
    t.seen = ""
    t.read_until("password of root@127.0.0.1: ")
    t.type(SECRET + "\n")
    assert t.status() == 0
    assert (point / "disk.raw").read_bytes() == sparse.read_bytes()
    assert imgfs("umount", point).returncode == 0


def test_info_asks_as_well(sshd: Sshd, sparse: Path, tmp_path: Path) -> None:
    """It takes no options: the key and the known hosts are where ssh has them."""
    home = tmp_path / ".ssh"
    home.mkdir(0o700)
    for name, to in (("locked", "id_ed25519"), ("locked.pub", "id_ed25519.pub")):
        (sshd.directory / name).rename(home / to)
    (sshd.directory / "known").rename(home / "known_hosts")
    t = Terminal("info", sshd.url(sparse), env={"HOME": str(tmp_path)})
    t.read_until(f"passphrase of {home / 'id_ed25519'}: ")
    t.type(SECRET + "\n")
    assert t.status() == 0
    assert f"({sparse.stat().st_size} bytes)" in t.seen
