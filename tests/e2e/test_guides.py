"""Every command of contrib/guides, in order, as it stands there but for the names of the host and
the directories."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.servers.ssh import Sshd

from . import guest

GUIDES = Path(__file__).parents[2] / "contrib/guides"
MIB = 1 << 20
# The guests have no boot loader, and nobody sits at their console.
QEMU = """#!/bin/sh
exec {qemu} "$@" -cpu kvm64 -accel tcg -no-reboot -kernel {kernel} -initrd {initrd} \\
    -append 'console=ttyS0 panic=-1 job=read' </dev/null
"""

Run = Callable[[str], str]


def commands(name: str) -> str:
    """The indented lines of a guide."""
    lines = (GUIDES / name).read_text(encoding="utf-8").splitlines()
    return dedent("\n".join(line for line in lines if line.startswith("    ")))


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """/srv/images on kool."""
    path = tmp_path / "images"
    path.mkdir()
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The directory that one is in."""
    path = tmp_path / "here"
    path.mkdir()
    return path


@pytest.fixture
def run(sshd: Sshd, tmp_path: Path, far: Path, here: Path) -> Iterator[Run]:
    home, bin_, points = tmp_path / "home", tmp_path / "bin", tmp_path / "mnt"
    for path in (home / ".ssh", bin_, points):
        path.mkdir(parents=True)
    (bin_ / "imgfs").symlink_to(Path(sys.executable).parent / "imgfs")
    shutil.copy(sshd.directory / "known", home / ".ssh/known_hosts")
    shutil.copy(sshd.directory / "user", home / ".ssh/id_ed25519")

    def run(name: str) -> str:
        text = (
            commands(name)
            .replace("ssh://kool/srv/images", sshd.url(far))
            .replace("/mnt", str(points))
        )
        for point in dict.fromkeys(re.findall(rf"{points}/(\w+)", text)):
            (points / point).mkdir()
        done = subprocess.run(
            ["sh", "-ec", text],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "SSH_"))},
                "HOME": str(home),
                "PATH": f"{bin_}:{os.environ['PATH']}",
            },
        )
        assert done.returncode == 0, (done.stdout[-4000:], done.stderr[-4000:])
        return done.stdout

    yield run
    for point in points.iterdir():
        command = ["fusermount3", "-uzq", str(point)]
        subprocess.run(command, timeout=20, check=False, capture_output=True)


@pytest.fixture
def with_kernel(run: Run, tmp_path: Path) -> None:
    """The guest's kernel, which qemu is to boot."""
    kernel, modules = guest.kernels()[-1]
    (tmp_path / "initrd").write_bytes(guest.initramfs(modules))
    qemu = shutil.which("qemu-system-x86_64")
    shim = tmp_path / "bin/qemu-system-x86_64"
    shim.write_text(QEMU.format(qemu=qemu, kernel=kernel, initrd=tmp_path / "initrd"))
    shim.chmod(0o755)


def make_ext4(path: Path, size: int, files: Path) -> None:
    """A disk with a GPT and one partition, of which `files` is the content."""
    part = path.with_suffix(".part")
    with path.open("wb") as disk, part.open("wb") as inner:
        disk.truncate(size)
        inner.truncate(size - 2 * MIB)
    subprocess.run(
        ["sfdisk", "-q", path], input=b"label: gpt\nstart=2048\n", check=True, timeout=20
    )
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", files, part], check=True, timeout=60)
    where = [f"if={part}", f"of={path}", "bs=1M", "seek=1", "conv=notrunc,sparse"]
    subprocess.run(["dd", "status=none", *where], check=True, timeout=60)
    part.unlink()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    path.mkdir()
    for number in range(5):
        (path / f"file{number}").write_bytes(os.urandom(MIB + number))
    return path


def test_there_is_a_test_of_each() -> None:
    tested = re.findall(r'run\("([^"]+)"\)', Path(__file__).read_text())
    assert sorted(tested) == sorted(path.name for path in GUIDES.iterdir())


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("with_kernel")
@pytest.mark.skipif(bool(guest.missing()), reason=guest.missing())
def test_boot_a_remote_image(run: Run, far: Path, here: Path, tmp_path: Path) -> None:
    disk, line = guest.make_disk(tmp_path)
    shutil.move(disk, far / "guest.img")
    before = (far / "guest.img").read_bytes()
    assert line in run("boot-a-remote-image.md")
    assert (far / "guest.img").read_bytes() == before
    assert (here / "try.delta.qcow2").stat().st_size < 8 * MIB


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("with_kernel")
@pytest.mark.skipif(bool(guest.missing()), reason=guest.missing())
def test_vmware_to_kvm(run: Run, far: Path, here: Path, tmp_path: Path) -> None:
    disk, line = guest.make_disk(tmp_path)
    command = ["qemu-img", "convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]
    subprocess.run([*command, disk, far / "web.vmdk"], check=True, timeout=60)
    said = run("vmware-to-kvm.md")
    assert line in said
    assert "Images are identical." in said
    assert (
        subprocess.run(["qemu-img", "compare", disk, here / "web.qcow2"], timeout=60).returncode
        == 0
    )


def test_sparsify_and_upload(run: Run, far: Path, here: Path, files: Path) -> None:
    make_ext4(here / "old.img", 64 * MIB, files)
    with (here / "old.img").open("r+b") as disk:
        disk.seek(40 * MIB)
        disk.write(os.urandom(8 * MIB))  # what was a file once
    said = run("sparsify-and-upload.md")
    deleted = re.search(r"^D deleted +([\d.]+) MiB", said, re.M)
    assert deleted and 8 <= float(deleted[1]) < 12
    assert (far / "old.raw").stat().st_size == 64 * MIB
    assert (far / "old.raw").stat().st_blocks * 512 < 12 * MIB
    compared = ["qemu-img", "compare", far / "old.raw", far / "small.qcow2"]
    assert subprocess.run(compared, timeout=60).returncode == 0


def test_rescue_files(run: Run, far: Path, here: Path, files: Path) -> None:
    make_ext4(far / "broken.img", 64 * MIB, files)
    before = (far / "broken.img").read_bytes()
    said = run("rescue-files.md")
    assert "1.raw" in said and "file4" in said
    for path in files.iterdir():
        assert (here / "rescued" / path.name).read_bytes() == path.read_bytes()
    assert (far / "broken.img").read_bytes() == before
    assert (here / "repaired.img").stat().st_size == 64 * MIB
