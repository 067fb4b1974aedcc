"""Which of the files that images name are followed, and what they are then."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgfs.errors import UsageError
from imgfs.url.beside import beside
from imgfs.url.source import parse

BESIDE = [
    ("/vm/top.qcow2", "base.img", "/vm/base.img"),
    ("/vm/top.qcow2", "./base.img", "/vm/base.img"),
    ("/vm/top.qcow2", "file:base.img", "/vm/base.img"),
    ("/vm/top.qcow2", "/vm/base.img", "/vm/base.img"),
    ("/vm/top.qcow2", "/vm/../vm/base.img", "/vm/base.img"),
    ("ssh://u@h:1/vm/top.qcow2", "base.img", "ssh://u@h:1/vm/base.img"),
    ("ssh://h/~/top.qcow2", "base 1%.img", "ssh://h/~/base%201%25.img"),
    ("ssh://h/~/vm/top.qcow2", "base.img", "ssh://h/~/vm/base.img"),
    ("ssh://h/vm/top.qcow2", "/vm/base.img", "ssh://h/vm/base.img"),
    ("http://h:80/vm/top.qcow2?sig=1", "base.img", "http://h:80/vm/base.img"),
    ("http://h/a%20b/top.qcow2", "c d.img", "http://h/a%20b/c%20d.img"),
    ("s3://bucket/vm/top.vmdk", "top-s001.vmdk", "s3://bucket/vm/top-s001.vmdk"),
    ("s3://bucket/top.vmdk", "x.vmdk", "s3://bucket/x.vmdk"),
]

ELSEWHERE = [
    "../base.img",
    "/etc/shadow",
    "sub/base.img",
    "..",
    ".",
    "",
    "/vm/",
    "a\0b",
    "nbd://localhost/x",
    "json:{}",
    "ssh://h/vm/base.img",
    "file:/etc/shadow",
    "nbd:unix:/s",
]


@pytest.mark.parametrize(("image", "name", "found"), BESIDE)
def test_a_file_beside(image: str, name: str, found: str) -> None:
    assert beside(image, name) == found
    parse(found)


@pytest.mark.parametrize(
    "image", ["/vm/top.qcow2", "ssh://h/vm/top", "http://h/vm/t", "s3://bb/v/t"]
)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_file_elsewhere(image: str, name: str) -> None:
    with pytest.raises(UsageError, match=r"not a file beside it; .* by -o backing=SOURCE"):
        beside(image, name)


@pytest.mark.parametrize("image", ["nbd://localhost/top", "nbd+command:nbdkit memory 1M"])
def test_an_export_has_nothing_beside_it(image: str) -> None:
    with pytest.raises(UsageError, match="not a file beside it"):
        beside(image, "base.img")


def test_any_place() -> None:
    assert beside("/vm/top", "/other/base", any_place=True) == "/other/base"
    assert beside("/vm/top", "../base", any_place=True) == "/base"
    assert beside("/vm/top", "ssh://h/base", any_place=True) == "ssh://h/base"
    assert beside("ssh://h/vm/top", "/other/base", any_place=True) == "ssh://h/other/base"
    assert beside("nbd://localhost/top", "ssh://h/base", any_place=True) == "ssh://h/base"
    with pytest.raises(UsageError):
        beside("/vm/top", "json:{}", any_place=True)


def test_a_path_relative_to_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert beside("top.qcow2", "base") == str(tmp_path / "base")
