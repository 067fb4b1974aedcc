"""A file that changes under what is shown of it: ESTALE for who has it open, then the new bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.formats import qemu
from tests.mounts import MIB, Mount
from tests.servers.ssh import Sshd

from .test_mount_formats import SHOWN

Mounter = Callable[..., Mount]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """top.qcow2 on base.qcow2."""
    pool = tmp_path / "pool"
    pool.mkdir()
    base, top = pool / "base.qcow2", pool / "top.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", base, "8M")
    qemu.io(base, "qcow2", "write -P 1 0 8M")
    qemu.img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    qemu.io(top, "qcow2", "write -P 2 1M 1M")
    for path in (base, top):  # over plain SFTP a file is looked at for whole seconds
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return pool


@pytest.mark.parametrize(
    ("where", "changed"), [("local", "top"), ("local", "base"), ("ssh", "base")]
)
def test_decoded_and_encoded(
    mount: Mounter, sshd: Sshd, pool: Path, where: str, changed: str
) -> None:
    source = pool / "top.qcow2"
    words = () if where == "local" else ("-o", sshd.options)
    m = mount(source if where == "local" else sshd.url(source), *words)
    names = [m.point / "top.raw", *(m.point / f"top{extension}" for extension in SHOWN)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb", buffering=0)) for path in names]
        before = [os.pread(file.fileno(), MIB, 2 * MIB) for file in files]
        assert before[0] == b"\1" * MIB
        other = "write -P 3 0 8M" if changed == "base" else "write -P 3 2M 6M"
        qemu.io(pool / f"{changed}.qcow2", "qcow2", other)
        # Opening asks whether the file is the same; after that nobody is given an old byte.
        after = names[0].read_bytes()
        assert after == qemu.raw(source, "qcow2")
        assert after[4 * MIB :] == b"\3" * (4 * MIB)
        for file in files:
            with pytest.raises(OSError) as raised:
                os.pread(file.fileno(), 64 << 10, 6 * MIB)
            assert raised.value.errno == errno.ESTALE, file.name
    for path in names[1:]:
        kind = "vpc" if path.suffix == ".vhd" else path.suffix[1:]
        qemu.img("compare", "-f", kind, "-F", "raw", path, names[0])


@pytest.mark.parametrize("first", ["top.raw", "top.qcow2", "sparse/top.vdi"])
def test_changed_since_it_was_looked_at(
    mount: Mounter, sshd: Sshd, pool: Path, tmp_path: Path, first: str
) -> None:
    """No view was made of what `stat` told, and none is made of the old state any more."""
    source = pool / "top.qcow2"
    m = mount(sshd.url(pool) + "/", "-o", sshd.options)
    names = ["top.raw", *(f"{where}top{each}" for where in ("", "sparse/") for each in SHOWN)]
    for name in names:
        assert (m.point / "top" / name).stat().st_size
    qemu.io(source, "qcow2", "write -P 3 2M 6M")
    wanted = qemu.raw(source, "qcow2")
    for name in [first, *names]:
        path = m.point / "top" / name
        kind = {".vhd": "vpc"}.get(path.suffix, path.suffix[1:])
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        assert qemu.raw(copy, kind)[: len(wanted)] == wanted, name
