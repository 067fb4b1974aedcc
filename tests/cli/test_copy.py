"""`imgfs copy`: to files here and behind ssh, many at once, and what stops one."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounts import IMGFS, MIB, Mount, imgfs
from tests.servers.ssh import Sshd

Completed = subprocess.CompletedProcess[str]


def copy(*words: object, code: int = 0) -> Completed:
    done = imgfs("copy", *words, timeout=60)
    assert done.returncode == code, done.stderr
    return done


def refused(*words: object) -> str:
    """The one line that it is refused with."""
    said = copy("--no-progress", *words, code=1).stderr
    assert said.count("\n") == 1, said
    return said.removeprefix("imgfs: ").strip()


def same(one: Path, other: Path, format: str = "raw") -> None:
    command = ["qemu-img", "compare", "-q", "-f", "raw", "-F", format, one, other]
    subprocess.run(command, check=True, timeout=60)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def stored(path: Path) -> int:
    return path.stat().st_blocks * 512


FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "stream.vmdk": "vmdk", "vdi": "vdi"}
FORMATS |= {"vhd": "vpc", "vhdx": "vhdx"}


@pytest.mark.parametrize("format", FORMATS)
def test_each_format(sparse: Path, out: Path, state: Path, format: str) -> None:
    done = copy(sparse, out / f"a.{format}")  # its name says which
    assert (done.stdout, "disk: " in done.stderr) == ("", True)
    same(sparse, out / f"a.{format}", FORMATS[format])
    assert stored(out / f"a.{format}") < 8 * MIB
    assert names(out) == [f"a.{format}"]
    assert list(state.iterdir()) == []


def test_out_of_every_format(sparse: Path, out: Path) -> None:
    for name in ("qcow2", "vmdk"):
        command = ["qemu-img", "convert", "-O", name, sparse, out / f"a.{name}"]
        subprocess.run(command, check=True, timeout=60)
        copy(out / f"a.{name}", out / "b", "-O", "vdi", "--verify", "--no-progress")
        same(sparse, out / "b", "vdi")


def test_there_and_back_by_ssh(sparse: Path, out: Path, sshd: Sshd) -> None:
    there = out / "sub dir"
    there.mkdir()
    done = copy(sparse, sshd.url(there / "a.qcow2"), "-o", sshd.options, "--verify")
    assert "compared" in done.stderr
    same(sparse, there / "a.qcow2", "qcow2")
    assert names(there) == ["a.qcow2"]
    copy(sshd.url(there / "a.qcow2"), sshd.url(there / "b.raw"), "-o", sshd.options)
    assert (there / "b.raw").read_bytes()[: sparse.stat().st_size] == sparse.read_bytes()
    assert stored(there / "b.raw") < 5 * MIB
    copy(sshd.url(sparse), out / "c.raw", "-o", sshd.options, "--verify")
    assert (out / "c.raw").read_bytes() == sparse.read_bytes()
    assert stored(out / "c.raw") < 5 * MIB


def test_what_is_there_is_replaced_when_the_new_is_whole(sparse: Path, out: Path) -> None:
    (out / "a.raw").write_bytes(b"old")
    assert "no such file" in refused(out / "nothing", out / "a.raw")
    assert (out / "a.raw").read_bytes() == b"old"
    copy(sparse, out / "a.raw")
    assert (out / "a.raw").read_bytes() == sparse.read_bytes()


def test_blocks_of_zeroes_become_holes(out: Path) -> None:
    (out / "a").write_bytes(os.urandom(MIB) + bytes(6 * MIB) + os.urandom(5))
    copy(out / "a", out / "b", "-o", "extents=off")
    assert (out / "a").read_bytes() == (out / "b").read_bytes()
    assert stored(out / "b") < 2 * MIB


@pytest.mark.parametrize("size", [0, 1, 511, 65537])
def test_small_ones(out: Path, size: int) -> None:
    (out / "a").write_bytes(os.urandom(size))
    copy(out / "a", out / "b", "--verify")
    assert (out / "a").read_bytes() == (out / "b").read_bytes()


def test_without_free_blocks(tmp_path: Path, out: Path) -> None:
    disk = tmp_path / "fs.img"
    disk.write_bytes(os.urandom(64 * MIB))
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", disk], check=True, timeout=60)
    copy(disk, out / "all.raw")
    copy(disk, out / "used.raw", "--sparse", "--verify")
    copy(disk, out / "used.qcow2", "--sparse")
    assert stored(out / "used.raw") < stored(out / "all.raw") - 40 * MIB
    assert stored(out / "used.qcow2") < 20 * MIB
    subprocess.run(["e2fsck", "-fn", out / "used.raw"], check=True, timeout=60, capture_output=True)
    same(out / "used.raw", out / "used.qcow2", "qcow2")


def images(directory: Path, count: int) -> list[Path]:
    directory.mkdir()
    for number in range(count):
        (directory / f"disk{number}.img").write_bytes(os.urandom(MIB + number))
    return sorted(directory.iterdir())


def test_a_directory_of_images(tmp_path: Path, out: Path, sshd: Sshd) -> None:
    made = images(tmp_path / "pool", 5)
    (tmp_path / "pool/notes.txt").write_text("no image")
    done = copy(f"{sshd.url(tmp_path / 'pool')}/", out, "-o", sshd.options, "-j", "3")
    assert "[5/5] " in done.stderr
    assert names(out) == [f"disk{n}.raw" for n in range(5)]
    for path in made:
        assert (out / f"{path.stem}.raw").read_bytes() == path.read_bytes()


def test_a_pattern(tmp_path: Path, out: Path, sshd: Sshd) -> None:
    images(tmp_path / "pool", 4)
    pattern = sshd.url(tmp_path / "pool").rstrip("/") + "/disk[12].*"
    copy(pattern, f"{sshd.url(out)}/", "-o", sshd.options, "-j2", "-O", "qcow2")
    assert names(out) == ["disk1.qcow2", "disk2.qcow2"]
    copy(str(tmp_path / "pool/*3.img"), out)
    assert (out / "disk3.raw").stat().st_size == MIB + 3
    assert "nothing has such a name" in refused(tmp_path / "pool/x*", f"{out}/")


def test_a_manifest(tmp_path: Path, out: Path, sshd: Sshd, sparse: Path) -> None:
    manifest = tmp_path / "images.toml"
    manifest.write_text(
        f'[defaults]\nknown_hosts = "{sshd.directory / "known"}"\nkey = "{sshd.directory / "user"}"'
        f'\n[images.one]\nsource = "{sshd.url(sparse)}"\n[images.two]\nsource = "disk.img"\n'
        '[images.three]\ncommand = ["nbdkit", "-r", "file", "disk.img"]\n'
    )
    copy(manifest, out, "-j", "2")
    assert names(out) == ["one.raw", "three.raw", "two.raw"]
    for path in out.iterdir():
        assert path.read_bytes()[: sparse.stat().st_size] == sparse.read_bytes()


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path, out: Path) -> None:
    made = images(tmp_path / "pool", 6)
    made[2].write_bytes(b"QFI\xfb" + bytes(3) + b"\x09" + bytes(100))
    done = copy(f"{tmp_path / 'pool'}/", out, "-j", "2", code=1)
    assert "imgfs: 1 of 6 failed:\n" in done.stderr
    assert "disk2.img: " in done.stderr.splitlines()[-1]
    told = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert [line.partition("]")[0] for line in told] == [f"[{n}/6" for n in range(1, 7)]
    (failed,) = (line for line in told if "failed" in line)
    assert re.match(r"\[[1-4]/6\] disk2: failed: .*disk2.img: ", failed)  # when it did
    assert names(out) == [f"disk{n}.raw" for n in (0, 1, 3, 4, 5)]


def test_lines_of_json(tmp_path: Path, out: Path, sparse: Path) -> None:
    done = copy(sparse, tmp_path / "nothing.img", f"{out}/", "--progress=json", code=1)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == [
        *("begin", "done", "failed", "end")
    ]
    first, last = events[0], events[-1]
    assert (first["name"], first["size"]) == ("disk", sparse.stat().st_size)
    assert 3 * MIB < first["data"] < 4 * MIB
    assert events[-3]["done"] == first["data"]
    assert "no such file" in events[-2]["error"]
    assert last == {"event": "end", "images": 2, "copied": 1, "failed": 1}


def test_bars_at_a_terminal(out: Path, tmp_path: Path) -> None:
    images(tmp_path / "pool", 3)
    words = " ".join([*IMGFS, "copy", f"{tmp_path / 'pool'}/", f"{out}/", "-j2"])
    done = subprocess.run(
        ["script", "-qec", words, "/dev/null"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "3 of 3 images" in done.stdout
    assert re.search(r"\d [KM]iB/s", done.stdout)
    assert not re.search(r"\d [kM]B", done.stdout)  # as everywhere else
    assert len(list(out.iterdir())) == 3


def test_what_cannot_be_meant(sparse: Path, out: Path, tmp_path: Path) -> None:
    said = "many images need a directory, and there is none of this name; make it first"
    assert refused(sparse, sparse, out / "x") == f"{out}/x: {said}"
    said = "many images need a directory, and it is none"
    assert refused(sparse, sparse, sparse) == f"{sparse}: {said}"
    said = "many images need a directory; write a / at its end"
    assert refused(sparse, sparse, "ssh://kool/x") == f"ssh://kool/x: {said}"
    assert "no such directory" in refused(sparse, f"{tmp_path}/none/")
    assert "a web server can only be read" in refused(sparse, "http://127.0.0.1/x.raw")
    assert "is where both" in refused(sparse, sparse, out)
    assert "is what would be copied" in refused(sparse, sparse)
    assert not sparse.with_name(f"{sparse.name}.part").exists()
    assert refused(sparse, tmp_path / "none/x.raw") == f"{tmp_path}/none/: no such directory"
    for name in ("x.qed", "x.QCOW", "x.avhdx"):
        assert f"{name[2:].lower()} cannot be written" in refused(sparse, out / name)
    assert "there is no image in it" in refused(f"{out}/", f"{out}/")
    assert list(out.iterdir()) == []


def test_what_a_name_says(sparse: Path, out: Path) -> None:
    copy(sparse, out / "a.vpc")
    same(sparse, out / "a.vpc", "vpc")
    assert (out / "a.vpc").read_bytes()[:8] == b"conectix"
    copy(sparse, out / "a.qed", "-O", "raw")
    same(sparse, out / "a.qed")


def test_from_a_mount(mount: Callable[..., Mount], sparse: Path, out: Path) -> None:
    m = mount(sparse)
    copy(m.point / "disk.raw", out / "a.raw", "--verify")
    assert (out / "a.raw").read_bytes() == sparse.read_bytes()
    assert stored(out / "a.raw") < 5 * MIB


def test_without_fuse(sparse: Path, out: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "class Never:\n"
        "    def find_spec(self, name, *rest):\n"
        "        assert name.split('.')[0] != 'pyfuse3' and name != 'imgfs._native._fuse', name\n"
        "sys.meta_path.insert(0, Never())\n"
        "from imgfs.cli.main import main\n"
        "main()\n"
    )
    command = [IMGFS[0], "-c", program, "copy", str(sparse), str(out / "a.qcow2")]
    bare = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh", *command]
    subprocess.run(bare, check=True, timeout=60, stdin=subprocess.DEVNULL)
    same(sparse, out / "a.qcow2", "qcow2")
