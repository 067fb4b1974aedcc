"""Formats told by their content, against qemu-img's own idea of what it made."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from imgfs.formats.probe import probe
from tests.drive import Files, size_of

MADE = [
    ("qcow2", "qcow2", ""),
    ("qcow2", "qcow2", "compat=0.10"),
    ("qcow", "qcow", ""),
    ("vmdk", "vmdk", ""),
    ("vmdk", "vmdk", "subformat=streamOptimized"),
    ("vmdk", "vmdk", "subformat=monolithicFlat"),
    ("vmdk", "vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vdi", "vdi", ""),
    ("vpc", "vpc", ""),
    ("vpc", "vpc", "subformat=fixed"),
    ("vhdx", "vhdx", ""),
    ("qed", "qed", ""),
    ("parallels", "parallels", ""),
    ("raw", "raw", ""),
]


@pytest.mark.parametrize(("kind", "wanted", "options"), MADE)
def test_what_qemu_makes(tmp_path: Path, kind: str, wanted: str, options: str) -> None:
    path = tmp_path / "disk"
    command = ["qemu-img", "create", "-q", "-f", kind, *(["-o", options] if options else [])]
    subprocess.run([*command, str(path), "4M"], check=True, timeout=60)
    assert Files(path).run(probe(size_of(path))) == wanted
    shown = ["qemu-img", "info", "--output=json", str(path)]
    info = json.loads(subprocess.run(shown, capture_output=True, check=True, timeout=60).stdout)
    if options != "subformat=fixed" or wanted != "vpc":  # qemu looks for no footer
        assert info["format"] == wanted


@pytest.mark.parametrize("content", [b"", b"x", b"QFI", bytes(511), bytes(512), b"\xff" * 5000])
def test_what_is_nothing_else_is_raw(content: bytes) -> None:
    assert Files(content).run(probe(len(content))) == "raw"


def test_a_footer_with_a_wrong_checksum_is_a_guests() -> None:
    disk = bytes(4096) + b"conectix" + bytes(504)
    assert Files(disk).run(probe(len(disk))) == "raw"


def test_a_descriptor_after_comments() -> None:
    text = b"# made by hand\r\n\r\n# Disk DescriptorFile\r\nversion=1\r\n".ljust(512, b"\n")
    assert Files(text).run(probe(len(text))) == "vmdk"
    text = b"version=1\nname=notes on createThings\n".ljust(512)
    assert Files(text).run(probe(len(text))) == "raw"
