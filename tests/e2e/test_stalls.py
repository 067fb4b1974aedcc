"""A server that stops answering: who does not need it goes on, and who waits can be ended."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import MIB, Mount
from tests.servers.ssh import Sshd

Mounter = Callable[..., Mount]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))

STALLED = 100
PROMPT_S = 2.0
KILL_S = 1.0
UMOUNT_S = 10.0


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """128 MiB of data."""
    path = tmp_path / "big.img"
    path.write_bytes(os.urandom(128 * MIB))
    return path


@contextlib.contextmanager
def frozen(sshd: Sshd) -> Iterator[None]:
    sshd.send(signal.SIGSTOP)
    try:
        yield
    finally:
        sshd.send(signal.SIGCONT)


def dd(
    fd: int, offset: int, count: int = 1, out: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """A process that reads 64 KiB `count` times from the fd, which it alone has then.

    It does not open the file itself, because that asks the server whether it is the same.
    """
    words = ["dd", "bs=64k", f"count={count}", f"skip={offset >> 16}"]
    process = subprocess.Popen(words, stdin=fd, stdout=out, stderr=subprocess.PIPE)
    os.close(fd)
    return process


@contextlib.contextmanager
def ended_at_last(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate(timeout=20)


def in_flight(m: Mount) -> int:
    """Reads that wait in Python; of those that wait for the same blocks only one comes there."""
    (image,) = m.status()["images"].values()  # type: ignore[attr-defined]
    return int(image["in_flight"])


def wait_for(m: Mount, enough: Callable[[int], bool]) -> None:
    """Until the reads in flight are as many as that."""
    deadline = time.monotonic() + 10
    while not enough(in_flight(m)):
        assert time.monotonic() < deadline, in_flight(m)
        time.sleep(0.05)


def seconds(action: Callable[[], object]) -> float:
    begun = time.monotonic()
    action()
    return time.monotonic() - begun


def killed_in(process: subprocess.Popen[bytes]) -> float:
    assert process.poll() is None
    process.kill()
    return seconds(lambda: process.wait(20))


def read_direct(fd: int, offset: int, length: int) -> bytes:
    with mmap.mmap(-1, length) as buffer:
        assert os.preadv(fd, [buffer], offset) == length
        return buffer[:]


def test_cached_bytes_can_be_opened_while_the_server_is_silent(
    mount: Mounter, sshd: Sshd, sparse: Path
) -> None:
    m = mount(sshd.url(sparse), "-o", f"{sshd.options},timeout=30")
    raw = m.point / "disk.raw"
    wanted = sparse.read_bytes()
    assert raw.read_bytes() == wanted
    with frozen(sshd):
        assert seconds(raw.read_bytes) < 2 * PROMPT_S  # the first one asks
        assert seconds(raw.read_bytes) < PROMPT_S / 2
        assert raw.read_bytes() == wanted
    assert raw.read_bytes() == wanted


def test_stalled_reads_delay_nobody_else(mount: Mounter, sshd: Sshd, big: Path) -> None:
    m = mount(sshd.url(big), "-o", sshd.options)
    raw = m.point / "big.raw"
    with big.open("rb") as file:
        cached = file.read(MIB)
    fd = os.open(raw, os.O_RDONLY | os.O_DIRECT)
    assert read_direct(fd, 0, MIB) == cached

    def cached_bytes() -> None:
        assert read_direct(fd, 0, MIB) == cached

    fds = [os.open(raw, os.O_RDONLY | (os.O_DIRECT if i % 2 else 0)) for i in range(STALLED)]
    with frozen(sshd):
        # Each its own MiB, far from what was read ahead, half of them past the page cache.
        readers = [dd(each, (20 + i) * MIB) for i, each in enumerate(fds)]
        with ended_at_last(readers):
            wait_for(m, lambda count: count >= STALLED)
            took = {
                "cached bytes": seconds(cached_bytes),
                "stat": seconds(raw.stat),
                "a new lookup": seconds((m.point / "original/big.img").stat),
                "ls": seconds(lambda: sorted(m.point.iterdir())),
                "status": seconds(lambda: json.loads((m.point / ".imgfs/status.json").read_text())),
                "extents": seconds((m.point / "extents.json").stat),
            }
            assert all(process.poll() is None for process in readers)
            assert max(took.values()) < PROMPT_S, took
            # Opening asks for a while whether the source is the same.
            assert seconds((m.point / "extents.json").read_bytes) < 2 * PROMPT_S
            slowest = max(killed_in(process) for process in readers)
            assert slowest < KILL_S
            print(f"stalled: {took}, killed in {slowest:.3f} s")
            # What the kernel reads ahead for its page cache outlives who asked for it.
            wait_for(m, lambda count: count <= STALLED / 2)
    os.close(fd)
    assert raw.read_bytes() == big.read_bytes()


@pytest.mark.parametrize("direct", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_kill_ends_who_waits_for_the_same_blocks(
    mount: Mounter, sshd: Sshd, big: Path, direct: int
) -> None:
    m = mount(sshd.url(big), "-o", sshd.options)
    fds = [os.open(m.point / "big.raw", os.O_RDONLY | direct) for _ in range(10)]
    with frozen(sshd):
        readers = [dd(fds.pop(), 50 * MIB)]
        with ended_at_last(readers):
            wait_for(m, lambda count: count >= 1)
            readers += [dd(fd, 50 * MIB) for fd in fds]
            time.sleep(0.3)
            # The last first: who began it is not needed by the others.
            assert max(killed_in(process) for process in reversed(readers)) < KILL_S


@pytest.mark.parametrize(
    "action",
    ["os.stat(sys.argv[1])", "os.open(sys.argv[1], os.O_RDONLY)"],
    ids=["stat", "open"],
)
def test_kill_ends_who_waits_for_a_first_answer(
    mount: Mounter, sshd: Sshd, big: Path, action: str
) -> None:
    """Nothing was looked up before: the server must be asked for all that a stat tells."""
    m = mount(sshd.url(big), "-o", f"{sshd.options},lazy")
    with frozen(sshd):
        program = f"import os, sys; print(flush=True); {action}"
        process = subprocess.Popen(
            [sys.executable, "-c", program, m.point / "original/big.img"], stdout=subprocess.PIPE
        )
        with ended_at_last([process]), process.stdout:  # type: ignore[union-attr]
            assert process.stdout.readline() == b"\n"  # type: ignore[union-attr]
            time.sleep(0.5)
            assert killed_in(process) < KILL_S
    assert (m.point / "original/big.img").stat().st_size == 128 * MIB


def test_umount_with_stalled_reads_in_flight(mount: Mounter, sshd: Sshd, sparse: Path) -> None:
    for _ in range(20 if LONG else 3):
        m = mount(sshd.url(sparse), "-o", sshd.options)
        raw = m.point / "disk.raw"
        fds = [os.open(raw, os.O_RDONLY | os.O_DIRECT) for _ in range(20)]
        with frozen(sshd):
            # Two come to Python, the others wait natively for the same blocks.
            readers = [dd(fd, (5 + 15 * (i % 2)) * MIB) for i, fd in enumerate(fds)]
            with ended_at_last(readers):
                wait_for(m, lambda count: count >= 2)
                time.sleep(0.2)
                command = ["fusermount3", "-uz", str(m.point)]
                subprocess.run(command, timeout=20, check=True)
                for process in readers:
                    process.kill()
                assert select.select([m.process], [], [], UMOUNT_S)[0]
        assert not m.point.is_mount()


def test_server_killed_in_the_middle_of_a_read(mount: Mounter, sshd: Sshd, big: Path) -> None:
    m = mount(sshd.url(big), "-o", f"{sshd.options},timeout=3")
    raw, data = m.point / "big.raw", big.read_bytes()
    fd = os.open(raw, os.O_RDONLY | os.O_DIRECT)
    assert read_direct(fd, 0, MIB) == data[:MIB]
    other = os.open(raw, os.O_RDONLY | os.O_DIRECT)
    sshd.send(signal.SIGSTOP)
    reader = dd(other, 100 * MIB, count=16, out=subprocess.PIPE)
    with ended_at_last([reader]):
        wait_for(m, lambda count: count >= 1)
        sshd.stop()
        begun = time.monotonic()
        out, err = reader.communicate(timeout=20)
        assert time.monotonic() - begun < 3 + PROMPT_S
        # Any byte that it wrote would be made up.
        assert (reader.returncode, out) == (1, b"")
        assert os.strerror(errno.EIO).encode() in err
    # What is here needs nobody.
    assert read_direct(fd, 0, MIB) == data[:MIB]
    sshd.start()
    time.sleep(1.1)  # an error is remembered for a second
    assert read_direct(fd, 100 * MIB, MIB) == data[100 * MIB : 101 * MIB]
    os.close(fd)
    assert raw.read_bytes() == data


SIGNALLED = """
import os, signal, sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, True)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for i in range(int(sys.argv[2])):
    fd = libc.open(os.fsencode(sys.argv[1]), os.O_RDONLY | os.O_DIRECT)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    page = ctypes.create_string_buffer(8192)
    at = (ctypes.addressof(page) + 4095) & ~4095
    n = libc.pread(fd, ctypes.c_void_p(at), 4096, ctypes.c_long(i << 20))
    assert n == 4096, os.strerror(ctypes.get_errno())
    libc.close(fd)
signal.setitimer(signal.ITIMER_REAL, 0)  # Python takes the handler away before its end
"""


def test_signals_that_do_not_kill_disturb_nothing(mount: Mounter, sshd: Sshd, big: Path) -> None:
    """A file on a disk never gives EINTR, and qemu and Go programs rely on that."""
    m = mount(sshd.url(big), "-o", sshd.options)
    command = [sys.executable, "-c", SIGNALLED, m.point / "big.raw", "100"]
    subprocess.run(command, check=True, timeout=60)


def test_a_signal_ends_a_stalled_request_after_a_while(
    mount: Mounter, sshd: Sshd, big: Path
) -> None:
    """^C on what has a handler for it; reads are the kernel's to wait for, and end with SIGKILL."""
    with frozen(sshd):
        m = mount(sshd.url(big), "-o", f"{sshd.options},lazy")
        code = "import os, sys; print(flush=True); os.stat(sys.argv[1])"
        process = subprocess.Popen(
            [sys.executable, "-c", code, m.point / "big.raw"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with ended_at_last([process]):
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert seconds(lambda: process.wait(20)) < 5
