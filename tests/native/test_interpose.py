"""Which functions of libfuse pyfuse3 finds; with the wrong ones a mount is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounts import IMGFS

CLIENT = Path(__file__).with_name("client.c")
BOUND = """
import ctypes
from imgfs._native import load_fuse

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_char_p) for name in ("file", "base", "name", "address")]

load_fuse()
whole = ctypes.CDLL(None)
for name in ("fuse_session_new", "fuse_session_new_versioned", "fuse_session_fd",
             "fuse_session_receive_buf", "fuse_add_direntry_plus", "fuse_reply_open"):
    info = Info()
    assert ctypes.CDLL(None).dladdr(getattr(whole, name), ctypes.byref(info))
    assert b"/_native/_fuse." in info.file, (name, info.file)
"""
SESSION = """
import ctypes, sys
from imgfs._native import load_fuse

fuse = load_fuse()
client = ctypes.CDLL(sys.argv[1])
assert client.make_session(int(sys.argv[2])) == 0  # not armed: it goes straight on to libfuse
assert not fuse.hooked()
fuse.arm()
assert not fuse.hooked()
assert client.make_session(int(sys.argv[2])) == 0
assert fuse.hooked()
fuse.disarm()
"""


def python(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, env={**os.environ, **env}
    )


def libfuse() -> str:
    """The file of the one that the interposer is linked with."""
    code = "from imgfs._native import load_fuse; load_fuse(); print(open('/proc/self/maps').read())"
    found = re.search(r"/\S*libfuse3\.so\S*", python(code).stdout)
    assert found is not None
    return found[0]


def test_all_functions_are_found_here_first() -> None:
    """Whether or not the libfuse that this was compiled with has each of them."""
    done = python(BOUND)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("versioned", [0, 1])
def test_a_session_is_noticed_however_it_is_made(tmp_path: Path, versioned: int) -> None:
    library = tmp_path / "client.so"
    command = ["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", library, CLIENT]
    subprocess.run(command, check=True, timeout=60)
    done = python(SESSION, library, versioned)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_mounted_when_pyfuse3_does_not_come_here(tmp_path: Path) -> None:
    """A libfuse that was loaded before all is found first."""
    image, point = tmp_path / "disk.img", tmp_path / "mnt"
    image.write_bytes(bytes(4096))
    point.mkdir()
    done = subprocess.run(
        [*IMGFS, image, point],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "LD_PRELOAD": libfuse()},
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert f"{point}: cannot be mounted: " in done.stderr
    assert str(point) not in Path("/proc/self/mounts").read_text()
