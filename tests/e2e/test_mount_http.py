"""Images behind a real nginx and a real S3 server, mounted."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.cache.fills import FAILED_S
from tests.mounts import MIB, Mount, imgfs, kill_readers_of
from tests.servers.web import Nginx, Weed, make_certificate

Mounter = Callable[..., Mount]


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, sparse: Path) -> Path:
    """Every nginx serves it."""
    path = tmp_path / "www/disk.img"
    path.parent.mkdir()
    path.hardlink_to(sparse)
    return path


def run(*words: object) -> str:
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_bytes(mount: Mounter, nginx: Nginx, disk: Path, tmp_path: Path) -> None:
    m = mount(nginx.url("disk.img"))
    raw = m.point / "disk.raw"
    assert raw.stat().st_size == disk.stat().st_size
    assert raw.stat().st_mtime == int(disk.stat().st_mtime)
    run("cp", raw, tmp_path / "copy")
    run("cmp", disk, tmp_path / "copy")
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, raw)
    assert (m.point / "original/disk.img").read_bytes() == disk.read_bytes()


def test_blocks_of_zeroes_become_holes(mount: Mounter, nginx: Nginx, disk: Path) -> None:
    raw = mount(nginx.url("disk.img")).point / "disk.raw"
    assert raw.stat().st_blocks * 512 >= raw.stat().st_size
    assert raw.read_bytes() == disk.read_bytes()
    fd = os.open(raw, os.O_RDONLY)
    assert os.lseek(fd, 10 * MIB, os.SEEK_HOLE) == 10 * MIB
    os.close(fd)


def test_signature_is_shown_nowhere(
    mount: Mounter, nginx: Nginx, disk: Path, tmp_path: Path
) -> None:
    m = mount(nginx.url("disk.img") + "?signature=hidden")
    assert (m.point / "disk.raw").read_bytes() == disk.read_bytes()
    assert m.status()["images"]["disk"]["source"].endswith("/disk.img?...")  # type: ignore[index,call-overload]
    shown = [(m.point / ".imgfs/status.json").read_text(), Path("/proc/self/mountinfo").read_text()]
    shown += [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.name == "source"]
    assert len(shown) == 3
    assert not any("hidden" in text for text in shown)
    # And it is sent when the source is opened again because it changed.
    os.utime(disk, (1, 1))
    disk.write_bytes(b"new" * 1000)
    deadline = time.monotonic() + 10
    while (m.point / "disk.raw").stat().st_size != 3000 and time.monotonic() < deadline:
        try:
            with (m.point / "disk.raw").open("rb", buffering=0) as file:
                os.pread(file.fileno(), 4096, 30 * MIB)
        except OSError as exc:
            assert exc.errno == errno.ESTALE
    assert (m.point / "disk.raw").read_bytes() == b"new" * 1000
    assert all("?signature=hidden HTTP" in line for line in nginx.requests())


def test_https_trusts_what_the_environment_names(
    mount: Mounter,
    make_nginx: Callable[..., Nginx],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ca, certificate = make_certificate(tmp_path)
    server = make_nginx(certificate=certificate)
    point = tmp_path / "point"
    point.mkdir()
    done = imgfs(server.url("disk.img"), point)
    assert done.returncode == 1
    assert "not trusted" in done.stderr
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    raw = mount(server.url("disk.img")).point / "disk.raw"
    assert raw.read_bytes() == (tmp_path / "www/disk.img").read_bytes()


def test_refusals_are_one_line(nginx: Nginx, tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    cases = [
        (nginx.url("missing"), "rw", "no such file"),
        (nginx.url(""), "rw", "names no file"),
        (nginx.url("disk.img").replace("//", "//me:hidden@"), "rw", "does not belong into a URL"),
        ("http://127.0.0.1:1/x", "rw", "refused"),
        (nginx.url("disk.img"), "s3_secret_key=hidden", "environment"),
        ("s3://key:hidden@bucket/x", "rw", "AWS_ACCESS_KEY_ID"),
    ]
    for source, options, text in cases:
        done = imgfs(source, point, "-o", options)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert text in done.stderr
        assert "hidden" not in done.stderr
    assert not point.is_mount()


def test_server_dies_and_comes_back(mount: Mounter, nginx: Nginx, disk: Path) -> None:
    raw = mount(nginx.url("disk.img"), "-o", "timeout=2").point / "disk.raw"
    fd = os.open(raw, os.O_RDONLY | os.O_DIRECT)
    nginx.stop()
    begun = time.monotonic()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.pread(fd, 4096, 5 * MIB)
    assert time.monotonic() - begun < 10
    nginx.start()
    time.sleep(FAILED_S)  # so long is the error remembered
    assert raw.read_bytes() == disk.read_bytes()
    os.close(fd)


def test_kill_ends_a_reader_of_a_frozen_server(mount: Mounter, nginx: Nginx, disk: Path) -> None:
    raw = mount(nginx.url("disk.img")).point / "disk.raw"
    raw.stat()
    fd = os.open(raw, os.O_RDONLY)
    kill_readers_of(raw, nginx.send)
    assert os.pread(fd, 4096, 5 * MIB) == disk.read_bytes()[5 * MIB : 5 * MIB + 4096]
    os.close(fd)


def test_replaced_source_gives_new_bytes_only(mount: Mounter, nginx: Nginx, disk: Path) -> None:
    raw = mount(nginx.url("disk.img")).point / "disk.raw"
    assert raw.read_bytes() == disk.read_bytes()
    new = disk.with_name("new")
    new.write_bytes(os.urandom(4 * MIB + 7))
    os.utime(new, (1, 1))
    new.replace(disk)
    assert raw.read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("age_s", [60, 0])
def test_kept_from_mount_to_mount_unless_it_is_young(
    mount: Mounter, nginx: Nginx, disk: Path, age_s: int
) -> None:
    """nginx's ETag of a file that was just written may be the next one's, too."""
    when = time.time() - age_s + (0 if age_s else 60)
    os.utime(disk, (when, when))
    for number in range(2):
        before = len(nginx.requests())
        m = mount(nginx.url("disk.img"))
        assert (m.point / "disk.raw").read_bytes() == disk.read_bytes()
        assert imgfs("umount", m.point).returncode == 0
        ranges = [
            line for line in nginx.requests()[before:] if '"GET' in line and " 206 1 " not in line
        ]
        assert bool(ranges) == (number == 0 or not age_s)


def test_unmount_though_the_server_is_frozen(mount: Mounter, nginx: Nginx) -> None:
    m = mount(nginx.url("disk.img"))
    nginx.send(signal.SIGSTOP)
    try:
        done = imgfs("umount", m.point)
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        nginx.send(signal.SIGCONT)


def test_s3(mount: Mounter, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore
    import obstore.store

    directory = tmp_path / "weed"
    directory.mkdir()
    weed = Weed(directory)
    try:
        for name, value in weed.environment.items():
            monkeypatch.setenv(name, value)
        store = obstore.store.S3Store(weed.bucket, client_options={"allow_http": True})
        deadline = time.monotonic() + 30
        while True:
            try:
                obstore.put(store, "a/disk.img", sparse)
                break
            except obstore.exceptions.BaseError:
                if time.monotonic() > deadline:
                    raise
        m = mount("s3://images/a/disk.img")
        run("cp", m.point / "disk.raw", tmp_path / "copy")
        run("cmp", sparse, tmp_path / "copy")
        assert weed.secret not in (m.point / ".imgfs/status.json").read_text()
        assert imgfs("umount", m.point).returncode == 0
    finally:
        weed.stop()
