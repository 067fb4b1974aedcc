"""contrib/systemd under a real systemd: a mount on demand, a service that comes back."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.machine import Machine
from tests.servers.ports import free_port
from tests.servers.ssh import Sshd

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
OFF = "imgfs@srv-off.service"
SERVICE = "imgfs@srv-service.service"


def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("systemd")
    (place / "pool").mkdir()
    with (place / "pool/disk.img").open("wb") as file:
        file.write(os.urandom(MIB))
        file.truncate(8 * MIB)
    return place


@pytest.fixture(scope="module")
def sshd(place: Path) -> Iterator[Sshd]:
    (place / "sshd").mkdir()
    server = Sshd(place / "sshd")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def machine(place: Path, sshd: Sshd) -> Iterator[Machine]:
    """The units as they are, with drop-ins that say what a person would say, and short times."""
    units = place / "units"
    shutil.copytree(REPOSITORY / "contrib/systemd", units)
    source = sshd.url(place / "pool") + "/"

    def drop_in(unit: str, text: str) -> None:
        (units / f"{unit}.d").mkdir()
        (units / f"{unit}.d/test.conf").write_text(text)

    def enable(unit: str, name: str) -> None:
        wants = units / "multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / name).symlink_to(f"/etc/systemd/system/{unit}")

    drop_in("srv-images.mount", f"[Mount]\nWhat={source}\nOptions=_netdev,{sshd.options}\n")
    drop_in("srv-images.automount", "[Automount]\nTimeoutIdleSec=2\n")
    drop_in(SERVICE, f"[Service]\nEnvironmentFile={place}/service.conf\nWatchdogSec=3\n")
    (place / "service.conf").write_text(f"SOURCE={source}\nOPTIONS={sshd.options}\n")
    drop_in(OFF, f"[Service]\nEnvironmentFile={place}/off.conf\n")
    (place / "off.conf").write_text(f"SOURCE=ssh://127.0.0.1:{free_port()}/pool/\n")
    for unit in (SERVICE, OFF):  # in place of /etc/imgfs/NAME.conf
        text = (units / "imgfs@.service").read_text().replace("=/etc/imgfs/%i", "=-/etc/imgfs/%i")
        (units / "imgfs@.service").write_text(text)
        enable("imgfs@.service", unit)
    enable("srv-images.automount", "srv-images.automount")
    # Not resolved: it finds its packages by the place that it is started from.
    imgfs = Path(sys.executable).parent / "imgfs"
    booted = Machine(place / "root", units, imgfs, [REPOSITORY, place])
    yield booted
    booted.stop()


def test_units_are_well_formed(machine: Machine) -> None:
    done = machine.run(
        "systemd-analyze", "verify", "--man=no", "srv-images.mount", "srv-images.automount", SERVICE
    )
    said = [line for line in done.stderr.splitlines() if "imgfs" in line or "srv-images" in line]
    assert (done.returncode, said) == (0, [])


def test_boot_waits_for_no_server(machine: Machine) -> None:
    """One of the services' servers is down all the time."""
    assert machine.property("multi-user.target", "ActiveState") == "active"
    assert machine.property(OFF, "ActiveState") == "active"
    assert machine.run("stat", "-f", "-c", "%T", "/srv/off").stdout.strip() == "fuseblk"
    assert machine.boot_s < 60


def test_a_service_shows_its_images(machine: Machine, place: Path) -> None:
    machine.says("cmp", "/srv/service/disk/disk.raw", place / "pool/disk.img")
    machine.says("mkdir", "/srv/service/disk/snapshots/one")
    assert machine.says("ls", "/var/lib/imgfs") != ""
    assert machine.says("stat", "-c", "%a", "/var/lib/imgfs", "/var/cache/imgfs") == "700\n700"


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_service_comes_back(machine: Machine, place: Path, how: str) -> None:
    """Killed, and hanging: systemd's watchdog then ends it."""
    before = int(machine.property(SERVICE, "NRestarts"))
    word = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how]
    machine.says("systemctl", "kill", f"--signal={int(word)}", "--kill-whom=main", SERVICE)
    until(lambda: int(machine.property(SERVICE, "NRestarts")) > before, machine.journal())
    until(lambda: machine.property(SERVICE, "ActiveState") == "active", machine.journal())
    machine.says("cmp", "/srv/service/disk/disk.raw", place / "pool/disk.img")


def test_a_service_ends(machine: Machine) -> None:
    machine.says("systemctl", "stop", SERVICE)
    assert machine.run("mountpoint", "-q", "/srv/service").returncode != 0
    assert machine.property(SERVICE, "Result") == "success"
    machine.says("systemctl", "start", SERVICE)


SCATTER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    for block in range(0, 2048, 2):
        os.pwrite(fd, b"x" * 4096, block * 4096)
        print(block)
except OSError as exc:
    sys.exit(0 if "No space" in str(exc) else exc)
"""


def test_a_service_stays_until_what_was_written_is_durable(machine: Machine) -> None:
    machine.says("mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", "/var/lib/imgfs")
    try:
        machine.says("systemctl", "restart", SERVICE)
        raw = "/srv/service/disk/snapshots/full/full.raw"
        machine.says("mkdir", "/srv/service/disk/snapshots/full")
        written = machine.says(sys.executable, "-c", SCATTER, raw).split()
        assert len(written) > 200
        machine.says("systemctl", "stop", "--no-block", SERVICE)
        until(
            lambda: "cannot be made durable" in machine.property(SERVICE, "StatusText"),
            machine.journal(),
        )
        machine.says("mountpoint", "-q", "/srv/service")
        assert machine.property(SERVICE, "ActiveState") == "deactivating"
        machine.says("mount", "-o", "remount,size=16m", "/var/lib/imgfs")
        until(lambda: machine.property(SERVICE, "ActiveState") == "inactive", machine.journal())
        assert machine.property(SERVICE, "Result") == "success"
        machine.says("systemctl", "start", SERVICE)
        for block in (written[0], written[-1]):
            skip = ["bs=4096", "count=1", f"skip={block}", "status=none"]
            assert machine.says("dd", f"if={raw}", *skip) == "x" * 4096
        machine.says("systemctl", "stop", SERVICE)
    finally:
        machine.run("umount", "-l", "/var/lib/imgfs")
        machine.run("systemctl", "start", SERVICE)


def test_automount(machine: Machine, place: Path) -> None:
    """Twice: it is mounted when it is looked at, and goes when nobody does."""
    for _ in range(2):
        assert machine.property("srv-images.mount", "ActiveState") == "inactive"
        machine.says("cmp", "/srv/images/disk/disk.raw", place / "pool/disk.img")
        assert machine.says("findmnt", "-n", "-o", "FSTYPE", "-t", "fuse.imgfs", "/srv/images")
        until(
            lambda: machine.property("srv-images.mount", "ActiveState") == "inactive",
            machine.journal(),
        )
        until(lambda: machine.run("pgrep", "-f", "imgfs.*/srv/images").returncode != 0, "it lives")


def test_a_users_service(machine: Machine, place: Path, sshd: Sshd) -> None:
    """As a user has it who logs in: here root, with the manager that a login would start."""
    home = machine.says("sh", "-c", "getent passwd 0 | cut -d: -f6")
    units, config = f"{home}/.config/systemd/user", f"{home}/.config/imgfs"
    machine.says("mkdir", "-p", units, config)
    machine.says("cp", REPOSITORY / "contrib/systemd/user/imgfs@.service", units)
    text = f"SOURCE={sshd.url(place / 'pool')}/\nOPTIONS={sshd.options}\n"
    (place / "user.conf").write_text(text)
    machine.says("cp", place / "user.conf", f"{config}/images.conf")
    machine.says("systemctl", "start", "user@0.service")
    user = ["env", "XDG_RUNTIME_DIR=/run/user/0", "systemctl", "--user"]
    machine.says(*user, "enable", "--now", "imgfs@images")
    machine.says("cmp", f"{home}/images/disk/disk.raw", place / "pool/disk.img")
    machine.says(*user, "stop", "imgfs@images")
    assert machine.run("mountpoint", "-q", f"{home}/images").returncode != 0
