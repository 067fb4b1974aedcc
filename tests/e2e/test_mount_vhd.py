"""VHD and VHDX through a mount: a chain of differencing disks, and a log to be replayed."""

from __future__ import annotations

import errno
import random
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs.formats import vhd_tables, vhdx_tables
from tests.formats import qemu, vhdx_files
from tests.formats.test_vhd import Differencing
from tests.mounts import MIB, Mount

Mounter = Callable[..., Mount]


def shown(m: Mount) -> bytes:
    (raw,) = m.point.glob("*.raw")
    return raw.read_bytes()


def vhd_parent(path: Path) -> bytes:
    """Its id."""
    qemu.img("create", "-q", "-f", "vpc", "-o", "force_size=on", path, "4M")
    qemu.io(path, "vpc", "write -P 1 0 2M", "write -P 2 3M 1M")
    footer = vhd_tables.footer(path.read_bytes()[-512:])
    assert footer is not None
    return footer.unique_id


def test_a_differencing_vhd(mount: Mounter, tmp_path: Path) -> None:
    parent_id = vhd_parent(tmp_path / "parent.vhd")
    names = {b"W2ru": ".\\parent.vhd".encode("utf-16-le")}
    made = Differencing(4 * MIB, 2 * MIB, names, "parent.vhd")
    made.fields = (*made.fields[:7], parent_id, *made.fields[8:])
    content = random.Random(1).randbytes(2 * MIB)
    made.add(0, {1, 3}, content)
    (tmp_path / "child.vhd").write_bytes(made.file())
    wanted = bytearray(qemu.raw(tmp_path / "parent.vhd", "vpc"))
    for sector in (1, 3):
        wanted[sector * 512 : sector * 512 + 512] = content[sector * 512 :][:512]
    assert shown(mount(tmp_path / "child.vhd")) == wanted


def test_a_differencing_vhdx(mount: Mounter, tmp_path: Path) -> None:
    parent = tmp_path / "parent.vhdx"
    qemu.img("create", "-q", "-f", "vhdx", "-o", "block_size=1M", parent, "4M")
    qemu.io(parent, "vhdx", "write -P 1 0 2M", "write -P 2 3M 1M")
    headers = [
        vhdx_tables.header(parent.read_bytes()[at:][:4096]) for at in vhdx_tables.HEADER_OFFSETS
    ]
    newest = max(headers, key=lambda header: header.sequence_number)
    parent_id = uuid.UUID(bytes_le=newest.data_write_guid)
    made = vhdx_files.Differencing(4 * MIB, MIB)
    values = {"parent_linkage": f"{{{parent_id}}}", "relative_path": ".\\parent.vhdx"}
    made.items[vhdx_tables.PARENT_LOCATOR_ITEM] = vhdx_files.locator(values)
    content = random.Random(1).randbytes(MIB)
    made.add(2, content)
    (tmp_path / "child.vhdx").write_bytes(made.file())
    wanted = bytearray(qemu.raw(parent, "vhdx"))
    wanted[2 * MIB : 3 * MIB] = content
    assert shown(mount(tmp_path / "child.vhdx")) == wanted


def test_another_parent_is_refused(mount: Mounter, tmp_path: Path) -> None:
    vhd_parent(tmp_path / "parent.vhd")
    names = {b"W2ru": ".\\parent.vhd".encode("utf-16-le")}
    (tmp_path / "child.vhd").write_bytes(Differencing(4 * MIB, 2 * MIB, names, "").file())
    m = mount(tmp_path / "child.vhd", says="only original/ can be read")
    with pytest.raises(OSError) as raised:
        shown(m)
    assert raised.value.errno == errno.EIO


def test_a_log(mount: Mounter, tmp_path: Path) -> None:
    """A block whose bytes are there but which only the log has put into the BAT."""
    path = tmp_path / "disk.vhdx"
    qemu.img("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "4M")
    qemu.io(path, "vhdx", "write -P 9 1M 1M")
    file, wanted = bytearray(path.read_bytes()), qemu.raw(path, "vhdx")
    regions = vhdx_tables.regions(bytes(file[192 << 10 : 256 << 10]))
    assert regions is not None
    (at,) = (r.file_offset for r in regions if r.guid == vhdx_tables.BAT_REGION)
    table = bytes(file[at : at + 4096])
    file[at : at + 4096] = bytes(4096)
    vhdx_files.set_log(file, vhdx_files.log_entry(1, 0, [(at, table)], len(file)))
    path.write_bytes(file)
    assert shown(mount(path)) == wanted
