"""A machine booted by a real systemd, as PID 1 of namespaces of its own.

It sees this system's files, and what it writes goes to memory.  The network is this system's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

# Of /sys only what cannot be written: udev leaves a read-only one's devices alone.
BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$base/root"
for shared in "$@"; do
    mkdir -p "$base/root$shared"
    mount --bind "$shared" "$base/root$shared"
done
cd "$base/root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty fuse autofs; do
    touch "dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/pts dev/shm
ln -s /proc/self/fd dev/fd
ln -sfn "$imgfs" usr/local/bin/imgfs
# What this system starts of its own is not wanted.
rm -rf etc/systemd/system/*.wants etc/rc?.d
mkdir -p etc/imgfs srv
cp -r "$units/." etc/systemd/system/
mkdir -p .old
pivot_root . .old
cd /
umount -l .old
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=multi-user.target --show-status=0 --log-level=warning
"""

UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup"]


class Machine:
    """`units` is a directory of unit files to be there; `shared` are directories of this system
    that it sees as they are.  Waits until the system is up."""

    def __init__(self, base: Path, units: Path, imgfs: Path, shared: Sequence[Path]) -> None:
        base.mkdir()
        self._unshare = subprocess.Popen(
            [*UNSHARE, "sh", "-c", BOOT, "sh", *map(str, shared)],
            env={**os.environ, "base": str(base), "units": str(units), "imgfs": str(imgfs)},
            stdin=subprocess.DEVNULL,
        )
        self._init = 0
        begun = time.monotonic()
        try:
            while self._state() not in ("running", "degraded"):
                if time.monotonic() > begun + 60 or self._unshare.poll() is not None:
                    raise TimeoutError(f"systemd does not come up: {self._state()}")
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise
        self.boot_s = time.monotonic() - begun

    def _state(self) -> str:
        if not self._init:
            children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
            self._init = int(children.read_text().split()[0] if children.read_text() else 0)
        comm = Path(f"/proc/{self._init}/comm")
        if not self._init or comm.read_text().strip() != "systemd":
            return "not begun"
        return self.run("systemctl", "is-system-running").stdout.strip()

    def run(self, *words: object, timeout: float = 40) -> subprocess.CompletedProcess[str]:
        """A command in it."""
        enter = ["nsenter", "-t", str(self._init), *["-m", "-p", "-u", "-i", "-C"], "--"]
        return subprocess.run(
            [*enter, *map(str, words)], capture_output=True, text=True, timeout=timeout, check=False
        )

    def says(self, *words: object) -> str:
        """What a command that must succeed writes."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self.journal()}"
        return done.stdout.strip()

    def property(self, unit: str, name: str) -> str:
        return self.says("systemctl", "show", "--value", "-p", name, unit)

    def journal(self) -> str:
        return self.run("journalctl", "--no-pager", "-n", "40").stdout

    def stop(self) -> None:
        if self._init:
            os.kill(self._init, signal.SIGKILL)  # and all that is in it
        else:
            self._unshare.kill()
        self._unshare.wait(20)
