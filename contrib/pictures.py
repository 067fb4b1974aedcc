#!/usr/bin/env python3
"""Make the pictures that README shows: .venv/bin/python contrib/pictures.py [-d DIR] [NAME...]

NAMEs are map, top and copy; all, if there is none.  Each shows what imgfs really did, to disks that
are made for it behind an sshd of our own, in a terminal that nobody sees.  All of that lives in
namespaces, where only /mnt differs from the machine's, and ends with them.  To make them, and to
mount filesystems, takes root; top and copy need the package tmux beside what tests/run.sh installs.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
NAMES = ("map", "top", "copy")
COLUMNS, LINES = 100, 24
RATE = 30 * MIB  # bytes a second that the far host sends
POOL = Path("/mnt/scratch")  # of the far host
MOUNTPOINT = Path("/mnt/pool")
HOME = Path("/mnt/home")  # nothing of it is shown
INSIDE = "--inside"
SLOWLY = "--slowly"


def main() -> None:
    if sys.argv[1:] == [SLOWLY]:
        slowly()
        return
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("-d", "--directory", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument(INSIDE, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", metavar="NAME")
    said = parser.parse_args()
    names = said.names or NAMES
    if unknown := set(names).difference(NAMES):
        parser.error(f"no such picture: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        parser.error("only root can mount filesystems")
    said.directory.mkdir(exist_ok=True)
    if said.inside is not None:
        inside(said.inside, said.directory, names)
        return
    with tempfile.TemporaryDirectory(prefix="imgfs-pictures-", dir="/var/tmp") as work:
        # Ours is the init of its namespace: with it, or with us, ends whatever it has started.
        apart = "setpriv --pdeathsig KILL unshare --mount --pid --fork --mount-proc --kill-child"
        again = [sys.executable, __file__, "-d", said.directory.resolve(), INSIDE, work, *names]
        sys.exit(subprocess.run([*apart.split(), *again], timeout=300).returncode)


def inside(work: Path, directory: Path, names: Sequence[str]) -> None:
    os.chdir(directory)
    for mount in Path("/proc/mounts").read_text().splitlines():
        # mkfs looks at every one, and would wait with it for its server.
        point, kind = mount.split()[1:3]
        if kind == "fuse" or kind.startswith("fuse."):
            point = point.encode().decode("unicode_escape")
            subprocess.run(["umount", "-l", point], timeout=20, check=False)
    run("mount", "--bind", work, "/mnt")
    for path in (POOL, MOUNTPOINT, HOME):
        path.mkdir()
    env = {"HOME": str(HOME), "TERM": "screen-256color", "LC_ALL": "C.UTF-8"}
    env["PATH"] = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    os.environ.clear()
    os.environ.update(env)
    serve_pool()
    make_disk(POOL / "fedora-33.img")
    if "map" in names:
        run("imgfs", "map", "--sparse", "--png", "map.png", f"ssh://kool{POOL}/fedora-33.img")
    if {"top", "copy"}.intersection(names):
        for name, mib in (("archive", 20), ("db1", 400), ("mail", 300), ("web1", 120)):
            scatter(POOL / f"{name}.img", mib * MIB)
        run("qemu-img", "create", "-q", "-f", "qcow2", POOL / "win10.qcow2", "40G")
        os.truncate(POOL / "win10.qcow2", 70_000)  # it was not uploaded whole
    if "top" in names:
        picture_of_top()
    if "copy" in names:
        picture_of_copy()


def run(*words: object, text: str | None = None) -> str:
    command = [str(word) for word in words]
    return subprocess.run(
        command, input=text, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    ).stdout


# The far host.


def serve_pool() -> None:
    """An sshd that its client knows as kool."""
    ssh = HOME / ".ssh"
    ssh.mkdir(mode=0o700)
    for key in (ssh / "id_ed25519", HOME / "host"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (ssh / "config").write_text(
        f"Host kool\n HostName 127.0.0.1\n Port {port}\n User root\n HostKeyAlias kool\n"
    )
    known = (HOME / "host.pub").read_text()
    (ssh / "known_hosts").write_text(f"kool {known}[127.0.0.1]:{port} {known}")
    Path("/run/sshd").mkdir(exist_ok=True)
    sftp = shlex.join([sys.executable, str(Path(__file__).resolve()), SLOWLY])
    said = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": HOME / "host",
        "AuthorizedKeysFile": ssh / "id_ed25519.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "Subsystem": f"sftp /usr/lib/openssh/sftp-server | {sftp}",
    }
    options = [f"-o{key}={value}" for key, value in said.items()]
    subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", "/dev/null", *options])

    def is_there() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    wait_until(is_there)


def slowly() -> None:
    """Pass on what comes, at the pace of a network, or else all is over at once."""
    begun, passed = time.monotonic(), 0
    while data := os.read(0, 1 << 16):
        now = time.monotonic()
        begun = max(begun, now - passed / RATE - 0.05)  # no haste after a rest
        passed += len(data)
        time.sleep(max(0.0, begun + passed / RATE - now))
        while data:
            data = data[os.write(1, data) :]


# Its disks.


def make_disk(path: Path) -> None:
    """A machine's disk of 2.5 GiB: its filesystems were used, and much was deleted again."""
    path.touch()
    os.truncate(path, 2560 * MIB)
    sizes = "size=64M, type=U", "size=300M", "size=1300M", "size=256M, type=S", "size=+"
    run("sfdisk", "-q", path, text="\n".join(("label: gpt", *sizes)))
    table = run("sfdisk", "-l", "-q", "-o", "start,sectors", path).splitlines()[1:]
    efi, boot, root, swap, home = (tuple(int(n) * 512 for n in line.split()) for line in table)
    rng = random.Random(33)
    with loop(path, *efi) as device:
        run("mkfs.vfat", "-n", "EFI", device)
    use_fat(f"{path}@@{efi[0]}", rng)
    with loop(path, *swap) as device:
        swap_out(device, swap[1], rng)
        run("mkswap", "-q", device)
    mke2fs, mkxfs = ("mkfs.ext4", "-q", "-L"), ("mkfs.xfs", "-q", "-L")
    makers = {boot: (*mke2fs, "boot"), root: (*mkxfs, "root"), home: (*mke2fs, "home")}
    point = HOME / "guest"
    point.mkdir()
    for part, maker in makers.items():
        with loop(path, *part) as device:
            run(*maker, device)
            run("mount", device, point)
            use(point, part[1] // 6, rng)
            run("umount", point)


@contextmanager
def loop(path: Path, start: int, size: int) -> Iterator[str]:
    where = ("--offset", start, "--sizelimit", size)
    device = run("losetup", "--find", "--show", *where, path).strip()
    with Path(device).open("rb"):
        run("losetup", "--detach", device)  # it goes with the last who has it open
        yield device


def use(point: Path, room: int, rng: random.Random) -> None:
    """Write files of many sizes, `room` bytes in all, and delete some of them."""
    paths = []
    while room > 0:
        size = min(room, int(2 ** rng.uniform(12, 25)))
        path = point / f"{rng.randrange(20)}" / f"{len(paths)}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(4096) * -(-size // 4096))
        paths.append(path)
        room -= size
    run("sync", "-f", point)  # or nothing of what is deleted would ever be on the disk
    for path in paths:
        if rng.random() < 0.4:
            path.unlink()


def use_fat(where: str, rng: random.Random) -> None:
    """As `use`; few kernels that are made for clouds can mount it."""
    for name in ("shim", "grub"):
        (HOME / name).write_bytes(rng.randbytes(3 * MIB))
        run("mcopy", "-i", where, HOME / name, f"::{name}")
    run("mdel", "-i", where, "::shim")


def swap_out(device: str, size: int, rng: random.Random) -> None:
    """What a swap partition holds once its machine was short of memory."""
    with Path(device).open("r+b") as file:
        for _ in range(20):
            file.seek(rng.randrange(size // MIB // 3) * MIB)
            file.write(rng.randbytes(MIB) * rng.randint(1, 3))


def scatter(path: Path, data: int) -> None:
    """`data` bytes in pieces, over a disk of ten times the size."""
    rng = random.Random(path.name)
    piece = rng.randbytes(MIB)
    with path.open("wb") as file:
        for start in sorted(rng.sample(range(10 * data // MIB), data // MIB)):
            file.seek(start * MIB)
            file.write(piece)
        file.truncate(10 * data)


# The terminal.


def picture_of_top() -> None:
    run("imgfs", f"ssh://kool{POOL}/", MOUNTPOINT)
    with Screen() as screen:
        screen.type(f"imgfs top {MOUNTPOINT}")
        screen.wait_for(lambda text: "q ends" in text)
        readers = [
            subprocess.Popen(
                ["dd", f"if={MOUNTPOINT}/{name}/{name}.raw", "of=/dev/null", "bs=1M"],
                stderr=subprocess.DEVNULL,
            )
            for name in ("db1", "mail", "fedora-33", "win10")
        ]
        busy = re.compile(r"open +[\d.]+ MiB/s +[\d.]+ MiB/s")
        screen.wait_for(lambda text: len(busy.findall(text)) == 3 and "is it cut" in text)
        screen.save(Path("top.svg"), "imgfs top")
        for reader in readers:
            reader.kill()
    run("imgfs", "umount", MOUNTPOINT)


def picture_of_copy() -> None:
    images = Path("/mnt/images")
    images.mkdir()
    with Screen() as screen:
        screen.type(f"imgfs copy -j 3 -O qcow2 'ssh://kool{POOL}/*.img' images/")
        half_way = re.compile(r"^(?!all )\S+ .* [1-9]\d%", re.M)
        screen.wait_for(lambda text: len(half_way.findall(text)) == 3 and "1 of 5" in text)
        screen.save(Path("copy.svg"), "imgfs copy")


class Screen:
    """A terminal with a shell in it."""

    def __init__(self) -> None:
        size = ("-x", COLUMNS, "-y", LINES)
        (HOME / "rc").write_text("PS1='$ '\n")
        shell = f"bash --noprofile --rcfile {HOME}/rc"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-c", "/mnt", *size, shell)
        self._tmux("set-option", "-g", "status", "off")
        self.wait_for(lambda text: "$" in text)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *exc: object) -> None:
        self._tmux("kill-server")

    def _tmux(self, *words: object) -> str:
        return run("tmux", "-S", HOME / "tmux", *words)

    def type(self, line: str) -> None:
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def wait_for(self, good: Callable[[str], bool]) -> None:
        wait_until(lambda: good(self.text()), self.text)

    def text(self) -> str:
        return self._tmux("capture-pane", "-p")

    def save(self, path: Path, title: str) -> None:
        from rich.console import Console
        from rich.text import Text

        console = Console(record=True, width=COLUMNS, file=io.StringIO())
        lines = self._tmux("capture-pane", "-e", "-p").rstrip()
        console.print(Text.from_ansi(lines), no_wrap=True, crop=True)
        path.write_text(console.export_svg(title=title, code_format=frame()), encoding="utf-8")


def frame() -> str:
    """rich's, but for the fonts that it would have fetched from elsewhere."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    without = re.sub(r"@font-face \{\{.*?\}\}\s*|<!--.*?-->\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)
    # Or else librsvg takes the spaces at the ends away.
    without = without.replace("<svg ", '<svg xml:space="preserve" ')
    return without.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


def wait_until(good: Callable[[], bool], seen: Callable[[], str] = str, for_s: float = 60) -> None:
    deadline = time.monotonic() + for_s
    while not good():
        if time.monotonic() > deadline:
            raise TimeoutError(seen())
        time.sleep(0.1)


if __name__ == "__main__":
    main()
