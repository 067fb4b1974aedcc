"""A small real guest: Debian's cloud kernel, busybox, and a disk of our own with ext4 on it."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
BUSYBOX = Path("/bin/busybox")
MARKER = "guest read everything: "
WAITS = "guest waits"
LARGE = 16 << 20  # bytes of the file that the guest makes and deletes

LIMIT_S = 200  # without kvm it may take a while
SILENCE_S = 2  # a kernel that runs at all says something sooner

TCG = ["-accel", "tcg"]
accelerators = ["-accel", "kvm", *TCG]

# What that kernel has as modules; ext4 and the serial port are built in.
DRIVERS = ("virtio_pci", "virtio_blk")

FIRST_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in {modules}; do /bin/busybox insmod /modules/$module; done
/bin/busybox mount -t ext4 /dev/vda /disk && exec /bin/busybox switch_root /disk /sbin/init
/bin/busybox poweroff -f
"""

# What it does is told by `job` on the kernel's command line.  "read" writes, too: with snapshot=on
# qemu keeps that, and the disk below must stay what it is.  "work" waits for a line when a large
# file is on the disk; then deletes it.
INIT = f"""#!/bin/sh
set -e
mount -t devtmpfs none /dev
mount -t proc none /proc
tell() {{ cd /data && echo "{MARKER}$(sha256sum * | sha256sum)"; }}
case $job in
read)
    tell
    dd if=/dev/zero of=/data/1 bs=64k count=8 conv=fsync 2>/dev/null
    ;;
work)
    for size in 1 7 20; do dd if=/dev/urandom of=/data/new$size bs=64k count=$size 2>/dev/null; done
    dd if=/dev/urandom of=/data/5 bs=1000 seek=50 count=9 conv=notrunc 2>/dev/null
    dd if=/dev/urandom of=/large bs=1M count={LARGE >> 20} 2>/dev/null
    sync
    echo "{WAITS}"
    read line
    rm /large /data/11
    sync
    fstrim -v /
    echo 3 >/proc/sys/vm/drop_caches
    tell
    ;;
esac
cd /
mount -o remount,ro /dev/vda /
poweroff -f
"""


def missing() -> str:
    """Why no guest can be booted here, or nothing; tests/run.sh installs all of it."""
    if shutil.which("qemu-system-x86_64") is None:
        return "no qemu-system-x86_64"
    if not BUSYBOX.exists():
        return "no static busybox"
    return "" if kernels() else "no Debian cloud kernel in .guest or /boot"


def kernels() -> list[tuple[Path, Path]]:
    """Kernels and their modules, the best last."""
    found = []
    for top in (Path("/"), CHECKOUT / ".guest"):
        for kernel in sorted(top.glob("boot/vmlinuz-*-cloud-amd64")):
            modules = top / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
            if modules.is_dir():
                found.append((kernel, modules))
    return found


def needed(modules: Path) -> dict[str, bytes]:
    """The drivers and what they depend on, by file name, in the order to load them."""
    paths = {p.name.split(".")[0]: p for p in modules.rglob("*.ko*")}
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        content = paths[name].read_bytes()
        if paths[name].suffix == ".xz":
            content = lzma.decompress(content)
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in filter(None, depends[1].decode().split(",") if depends else ()):
            add(other)
        order[f"{name}.ko"] = content

    for name in DRIVERS:
        if name in paths:  # else it is built in
            add(name)
    return order


def initramfs(modules: Path) -> bytes:
    """A cpio archive (newc) whose init loads the drivers and goes on from the disk."""
    drivers = needed(modules)
    script = FIRST_INIT.format(modules=" ".join(drivers))
    directory, program = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
    entries = [(name, directory, b"") for name in ("bin", "dev", "disk", "modules")]
    entries.append(("bin/busybox", program, BUSYBOX.read_bytes()))
    entries += [(f"modules/{name}", program, content) for name, content in drivers.items()]
    entries.append(("init", program, script.encode()))
    return b"".join(_cpio(number, *entry) for number, entry in enumerate(entries, 1)) + _cpio(
        0, "TRAILER!!!", 0, b""
    )


def _cpio(inode: int, name: str, mode: int, content: bytes) -> bytes:
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
    return b"".join(part + bytes(-len(part) % 4) for part in (header, content))


def make_disk(directory: Path) -> tuple[Path, str]:
    """An image without partitions, and the line that its init prints."""
    root = directory / "root"
    for name in ("bin", "sbin", "data", "dev", "proc"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in ("sh", "sha256sum", "dd", "poweroff", "mount", "rm", "sync", "fstrim"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "sbin/init").write_text(INIT)
    (root / "sbin/init").chmod(0o755)
    lines = []
    for name in sorted(map(str, range(12))):
        content = os.urandom(1 + 97531 * int(name))
        (root / "data" / name).write_bytes(content)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    disk = directory / "guest.img"
    with disk.open("wb") as file:
        file.truncate(96 << 20)
    command = ["mkfs.ext4", "-q", "-F", "-d", root, disk]
    subprocess.run(command, check=True, timeout=60)
    return disk, f"{MARKER}{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def told(said: str) -> list[str]:
    """The sum over its files, each time that the guest printed it."""
    lines = [line.strip() for line in said.splitlines()]
    return [line.removesuffix("  -") for line in lines if line.startswith(MARKER)]


def boot(
    disk: Path,
    directory: Path,
    *drive: str,
    job: str = "read",
    meanwhile: Callable[[], object] | None = None,
) -> str:
    """What the guest said on its serial port until it powered off.

    `drive` are options of its disk; `meanwhile` is called when it waits.
    """
    kernel, modules = kernels()[-1]
    initrd = directory / "initrd"
    initrd.write_bytes(initramfs(modules))
    words = ["-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"]
    words += ["-kernel", str(kernel), "-initrd", str(initrd)]
    words += ["-append", f"console=ttyS0 panic=-1 job={job}"]
    words += ["-drive", ",".join((f"file={disk}", "if=virtio", *drive))]
    while True:
        try:
            return _run(directory, meanwhile, *accelerators, *words)
        except KvmIsBroken:
            accelerators[:] = TCG  # for the boots that follow, too


class KvmIsBroken(Exception):
    """/dev/kvm is there but cannot run this guest, as in some virtual machines."""


def _run(directory: Path, meanwhile: Callable[[], object] | None, *words: str) -> str:
    said, complaints = directory / "serial", directory / "qemu-errors"
    command = ["qemu-system-x86_64", "-cpu", "kvm64", *words]
    environment = {**os.environ, "TMPDIR": str(directory)}  # where the snapshot goes
    with said.open("wb") as out, complaints.open("wb") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment
        )
    assert process.stdin is not None
    try:
        for tenth_s in range(LIMIT_S * 10):
            try:
                process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                silent = tenth_s >= SILENCE_S * 10 and said.stat().st_size == 0
                stopped = b"KVM internal error" in complaints.read_bytes()
                if (silent or stopped) and "kvm" in accelerators:
                    raise KvmIsBroken from None
            if meanwhile is not None and WAITS.encode() in said.read_bytes():
                meanwhile()
                meanwhile = None
                process.stdin.write(b"\n")
                process.stdin.flush()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
    text = said.read_text(errors="replace")
    assert process.returncode == 0, (complaints.read_text(), text)
    return text
