"""`imgfs top` on real mounts, on a terminal and without one."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import json
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest
from rich.console import Console

from imgfs.cli.top import _screen, plain
from imgfs.status.fields import CacheStatus, FastPathStatus, ImageStatus, MountStatus
from imgfs.status.rates import Look
from imgfs.units import format_size, parse_size
from tests.e2e.test_mount_prompts import Terminal
from tests.mounts import MIB, Mount, imgfs
from tests.status.test_metrics import parsed

Mounter = Callable[..., Mount]
ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[()].|[=>])")
LEFT = "\x1b[?1049l"  # back to the screen as it was


class Screen(Terminal):
    """A terminal of 40 lines and 160 columns with `imgfs top` on it."""

    def __init__(self, *words: object, term: str = "xterm") -> None:
        super().__init__("top", *words, env={"TERM": term, "COLUMNS": "", "LINES": ""})
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", 40, 160, 0, 0))
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.fd], [], [], max(0, timeout_s))[0]:
            return False
        try:
            data = os.read(self.fd, 4096)
        except OSError:
            return False
        self.seen += self._decoder.decode(data)
        return bool(data)

    def row(self, name: str, good: Callable[[list[str]], bool], within_s: float = 20) -> list[str]:
        """The cells of the image's line, as soon as they are good."""
        end = time.monotonic() + within_s
        while True:
            # The last picture that is whole.
            pictures = self.seen.split("\x1b[H")[:-1]
            lines = ESCAPE.sub("", pictures[-1] if pictures else "").splitlines()
            for line in lines:
                cells = re.split(r"\s{2,}", line.strip())
                if cells[0] == name and good(cells):
                    return cells
            assert self._read(end - time.monotonic()), self.seen

    def rates(self) -> list[str]:
        """What has been read, picture by picture."""
        text = ESCAPE.sub("", self.seen)
        return re.findall(r"disk +open +(\S+ \S+/s)", text)


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    screens: list[Screen] = []

    def make(*words: object, **how: str) -> Screen:
        screens.append(Screen(*words, **how))
        return screens[-1]

    yield make
    for each in screens:
        try:
            os.kill(each.pid, signal.SIGKILL)
            os.waitpid(each.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(each.fd)


def ended(on: Screen) -> str:
    """The command has ended well; what it has said since it left its screen."""
    assert on.status() == 0
    return on.seen.rpartition(LEFT)[2]


def cells_of(text: str, name: str) -> dict[str, str]:
    """Of the table without a terminal: the columns of the image's line."""
    lines = text.splitlines()
    split = [re.split(r"\s{2,}", line) for line in lines[lines.index("") + 1 :]]
    row = next(cells for cells in split if cells[0] == name)
    return dict(zip(split[0], row, strict=False))


@pytest.mark.parametrize("state", ["open", "not opened yet", "failed"])
def test_status_has_the_schema(mount: Mounter, sparse: Path, state: str) -> None:
    m = mount(sparse, *([] if state == "open" else ["-o", "lazy"]))
    if state == "failed":
        sparse.unlink()
    if state != "not opened yet":
        with contextlib.suppress(FileNotFoundError):
            (m.point / "disk.raw").read_bytes()
    status: Any = m.status()
    msgspec.convert(status, MountStatus)
    assert status.keys() == get_type_hints(MountStatus).keys() - {"last_error"}
    assert status["cache"].keys() == get_type_hints(CacheStatus).keys()
    assert status["fast_path"].keys() == get_type_hints(FastPathStatus).keys()
    assert status["images"]["disk"].keys() <= get_type_hints(ImageStatus).keys()
    assert status["images"]["disk"]["state"] == state


def test_metrics_of_a_mount(mount: Mounter, sparse: Path) -> None:
    from imgfs.status.metrics import render

    m = mount(sparse)
    (m.point / "disk.raw").read_bytes()
    status: Any = m.status()
    found = parsed(render(status))
    image = status["images"]["disk"]
    for origin in ("native", "python"):
        labels = frozenset({("image", "disk"), ("origin", origin)})
        assert found["imgfs_image_read_bytes_total", labels] == image[f"bytes_{origin}"]
    assert found["imgfs_image_size_bytes", frozenset({("image", "disk")})] == 64 * MIB + 1000


def test_once(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    (m.point / "disk.raw").read_bytes()
    status: Any = m.status()
    image = status["images"]["disk"]
    read = image["bytes_native"] + image["bytes_python"]
    assert read >= 64 * MIB + 1000
    for words in ([], ["--once"]):
        done = imgfs("top", m.point, *words)
        assert (done.returncode, done.stderr) == (0, "")
        cells = cells_of(done.stdout, "disk")
        assert cells["state"] == "open"
        assert cells["read"] == format_size(read)
        assert cells["errors"] == "0"
        assert done.stdout.startswith(f"process {m.pid}, 1 image, 1 opened; cache ")
        assert "\x1b" not in done.stdout


def test_not_opened_yet(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse, "-o", "lazy")
    cells = cells_of(imgfs("top", m.point).stdout, "disk")
    assert (cells["state"], cells["read"], cells["errors"]) == ("not opened yet", "-", "-")


def test_json(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    done = imgfs("top", "--json", m.point)
    assert (done.returncode, done.stderr) == (0, "")
    found, status = json.loads(done.stdout), m.status()
    assert found.keys() == status.keys()
    assert (found["pid"], found["images"]) == (status["pid"], status["images"])


def test_names_cannot_command_the_terminal(mount: Mounter, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m[bold]é\n.img"
    path.write_bytes(b"x" * 4096)
    done = imgfs("top", mount(path).point)
    assert "?[31m[bold]é? " in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("words", [[], ["--once"], ["--json"]])
def test_what_is_no_mount(tmp_path: Path, sparse: Path, words: list[str]) -> None:
    for path in (tmp_path, sparse, tmp_path / "missing"):
        done = imgfs("top", path, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"imgfs: {path}: is not a live imgfs mount\n"


def test_dead_mount(mount: Mounter, sparse: Path) -> None:
    m = mount(sparse)
    os.kill(m.pid, signal.SIGKILL)
    done = imgfs("top", m.point)
    assert (done.returncode, done.stdout) == (1, "")
    said = f"imgfs: {m.point}: its process has ended; run: fusermount3 -u {m.point}\n"
    assert done.stderr == said


@pytest.fixture
def stopped(mount: Mounter, sparse: Path) -> Iterator[Mount]:
    """A mount whose process does not run; its names are known already."""
    m = mount(sparse)
    os.kill(m.pid, signal.SIGSTOP)
    yield m
    os.kill(m.pid, signal.SIGCONT)


def test_mount_that_does_not_answer(stopped: Mount) -> None:
    done = imgfs("top", stopped.point)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"imgfs: {stopped.point}: its process does not answer; to take it away without waiting "
        f"run: fusermount3 -uz {stopped.point}\n"
    )


def read_all(m: Mount) -> None:
    subprocess.run(
        ["dd", f"if={m.point / 'disk.raw'}", "of=/dev/null", "bs=1M", "iflag=direct"],
        check=True,
        timeout=60,
        capture_output=True,
    )


def test_live_rates(mount: Mounter, sparse: Path, screen: Callable[..., Screen]) -> None:
    m = mount(sparse)
    on = screen(m.point)
    still = on.row("disk", lambda cells: cells[2].endswith("/s"))
    assert still[1:3] == ["open", "0 bytes/s"]
    read_all(m)
    on.row("disk", lambda cells: cells[2] != "0 bytes/s")
    on.row("disk", lambda cells: cells[2] == "0 bytes/s")
    rates = [parse_size(rate.removesuffix("/s").removesuffix("bytes")) for rate in on.rates()]
    # Looks are a second apart, or some more on a busy machine.
    assert 0.1 * 64 * MIB < sum(rates) < 1.2 * 64 * MIB
    assert not on.echoes()
    on.type("q")
    assert ended(on).strip() == ""
    assert on.echoes()


def test_live_ends_by_control_c(
    mount: Mounter, sparse: Path, screen: Callable[..., Screen]
) -> None:
    on = screen(mount(sparse).point)
    on.row("disk", lambda cells: True)
    on.type("\x03")
    assert "Traceback" not in ended(on)
    assert on.echoes()


def test_live_ends_by_sigterm(mount: Mounter, sparse: Path, screen: Callable[..., Screen]) -> None:
    on = screen(mount(sparse).point)
    on.row("disk", lambda cells: True)
    os.kill(on.pid, signal.SIGTERM)
    assert on.status() == 128 + signal.SIGTERM
    assert on.seen.endswith(LEFT)
    assert on.seen.rfind("\x1b[?25h") > on.seen.rfind("\x1b[?25l")  # the cursor is there
    assert on.echoes()


def test_live_while_the_mount_goes_away(
    mount: Mounter, sparse: Path, screen: Callable[..., Screen]
) -> None:
    m = mount(sparse)
    on = screen(m.point)
    on.row("disk", lambda cells: True)
    m.take_down()
    m.process = os.dup(on.fd)  # take_down closes it once more
    assert on.status() == 1
    said = ESCAPE.sub("", on.seen.rpartition(LEFT)[2])
    assert said == f"imgfs: {m.point}: is not a live imgfs mount\r\n"


def test_live_while_the_mount_is_silent(
    mount: Mounter, sparse: Path, screen: Callable[..., Screen]
) -> None:
    m = mount(sparse)
    on = screen(m.point)
    on.row("disk", lambda cells: True)
    os.kill(m.pid, signal.SIGSTOP)
    try:
        on.read_until("no answer for 3 s")
        on.type("q")
        assert ended(on).strip() == ""
    finally:
        os.kill(m.pid, signal.SIGCONT)


def test_dumb_terminal_gets_the_plain_table(
    mount: Mounter, sparse: Path, screen: Callable[..., Screen]
) -> None:
    on = screen(mount(sparse).point, term="dumb")
    said = ended(on)
    assert "\x1b" not in said
    assert cells_of(said, "disk")["state"] == "open"


@pytest.mark.parametrize(
    ("height", "images"), [(20, 100), (20, 14), (20, 13), (20, 12), (5, 2), (40, 0)]
)
def test_no_more_lines_than_the_screen_has(height: int, images: int) -> None:
    found = {
        f"image{n}": {"state": "open", "bytes_native": n, "source": "/x"} for n in range(images)
    }
    now = Look({"images": found, "pid": 1}, 0)
    out = io.StringIO()
    console = Console(file=out, width=160, height=height)
    console.print(_screen("/mnt", console, now, None, 0))
    lines = out.getvalue().splitlines()
    assert len(lines) <= max(height, 8)
    shown = [line for line in lines if line.startswith("image") and line[5].isdigit()]
    hidden = images - len(shown)
    assert lines[-1].rstrip() == (f"{hidden} more images; " if hidden else "") + "q ends"
    assert hidden == max(0, images - max(1, height - 7))
    # The busiest ones are those that can be seen.
    assert [line.split()[0] for line in shown] == [
        f"image{n}" for n in range(images - 1, hidden - 1, -1)
    ]


def test_errors_can_be_read_on_a_narrow_screen() -> None:
    said = "disk.qcow2: L1 entry 0 at byte 196608 is past the end of the file; is it cut?"
    images = {
        "disk": {"state": "open", "last_error": said},
        "good": {"state": "open", "last_error": ""},
        "other": {"state": "failed", "last_error": "no\x1b[31m luck"},
    }
    out = io.StringIO()
    console = Console(file=out, width=100, height=24)
    console.print(_screen("/mnt", console, Look({"images": images}, 0), None, 0))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[-5:] == ["", said, "other: no?[31m luck", "", "q ends"]


@pytest.mark.parametrize("height", [5, 12, 20, 60])
def test_errors_leave_room_for_the_images(height: int) -> None:
    images = {f"image{n}": {"state": "open", "last_error": "bad luck"} for n in range(30)}
    out = io.StringIO()
    console = Console(file=out, width=100, height=height)
    console.print(_screen("/mnt", console, Look({"images": images}, 0), None, 0))
    lines = out.getvalue().splitlines()
    assert len(lines) <= max(height, 8)
    errors = sum("bad luck" in line for line in lines)
    rows = sum(line.startswith("image") and " open " in line for line in lines)
    assert rows >= min(30, 1 + errors)
    assert errors == {5: 0, 12: 1, 20: 4, 60: 22}[height]


def test_plain_columns_stand_below_each_other() -> None:
    images = {
        "a": {"state": "open", "bytes_native": 5, "errors": 3, "last_error": "bad\x1b[0m luck"},
        "a long name": {"state": "not opened yet"},
    }
    lines = plain(Look({"images": images}, 0))[3:]
    assert [line[: line.index("  ")] for line in lines] == ["image", "a", "a long name"]
    assert (
        len({line.index(word) for line, word in zip(lines, ("state", "open", "not"), strict=True)})
        == 1
    )
    assert lines[1].endswith("  3  bad?[0m luck")
