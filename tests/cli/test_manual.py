"""The manual pages, `--help`, README and completion say the same, and what is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from imgfs.cli.manual import ENVIRONMENT, KEYS, NAMES, OPTIONS, STORE_KEYS, Entry, table
from imgfs.config.options import Options, parse_options
from imgfs.config.schema import DefaultsTable, HttpTable, ImageTable, S3Table

REPOSITORY = Path(__file__).parents[2]
VALUES = {
    "extents=": "off",
    "cache_size=": "2G",
    "timeout=": "3",
    "helpers=": "perl+python3",
    "format=": "raw",
    "uid=": "1",
    "gid=": "1",
    "umask=": "22",
    "write=": "through",
}


def names(entries: tuple[Entry, ...]) -> list[str]:
    return [name for entry in entries for name in dict.fromkeys(entry.names)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each as a person sees it."""
    directory = tmp_path_factory.mktemp("man")
    command = [sys.executable, "-m", "imgfs.cli.main", "install-files", "--prefix", directory]
    written = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = {}
    for line in filter(
        lambda each: re.search("/share/man/man[15]/", each), written.stdout.splitlines()
    ):
        done = subprocess.run(
            ["man", "--warnings", "-l", line],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "MANWIDTH": "500", "LC_ALL": "C.UTF-8"},
        )
        assert done.stderr == ""
        found[Path(line).name] = done.stdout
    return found


def test_every_option_is_told_and_taken() -> None:
    assert Options(read_only=True).read_only
    for name in names(OPTIONS):
        said = parse_options((name + VALUES.get(name, "x" * name.endswith("=")),))
        assert said != Options()
    untold = {"threads", "prompt", "object_settings", "among_others"}  # ours
    untold |= {"read_only", "kernel"}  # `ro`, and what any file system has
    told = {name.rstrip("=") for name in names(OPTIONS)}
    assert {*Options.__slots__} - untold == told - {"ro"}


def test_every_key_is_told() -> None:
    assert set(names(KEYS)) == set(ImageTable.__struct_fields__)
    assert set(DefaultsTable.__struct_fields__) == set(names(KEYS[:13]))
    known = {*S3Table.__struct_fields__, *HttpTable.__struct_fields__}
    assert set(names(STORE_KEYS)) == known


@pytest.mark.parametrize("entries", [OPTIONS, NAMES, ENVIRONMENT], ids=["options", "names", "env"])
def test_readme_says_the_same(entries: tuple[Entry, ...]) -> None:
    assert table(entries) in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_links_of_readme_lead_somewhere() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)", text, re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    for link in links:
        assert link in anchors or (REPOSITORY / link).exists(), link


def test_pages(pages: dict[str, str]) -> None:
    assert sorted(pages) == ["imgfs.1", "imgfs.toml.5"]
    for words in ("imgfs snapshot commit [OPTIONS] SOURCE NAME", "--force", "umask=OCTAL"):
        assert words in pages["imgfs.1"]
    for entry in KEYS:
        assert re.search(rf"\n       {entry.form}\s", pages["imgfs.toml.5"]), entry.form


def test_the_example_is_a_file_that_can_be_read(pages: dict[str, str], tmp_path: Path) -> None:
    from imgfs.config.file import load

    text = pages["imgfs.toml.5"].split("EXAMPLE\n")[1].split("SEE ALSO")[0]
    (tmp_path / "images.toml").write_text(text)
    assert list(load(tmp_path / "images.toml").images) == ["fedora-33", "archive", "old"]


def test_help_tells_of_the_options() -> None:
    command = [sys.executable, "-m", "imgfs.cli.main", "mount", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    for entry in OPTIONS:
        assert f"  {entry.form}" in done.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("imgfs sn", ["plain,snapshot"]),
        ("imgfs snapshot ex", ["plain,export"]),
        ("imgfs mount -o uma", ["plain,umask="]),
        ("imgfs mount -o ro,wri", ["plain,ro,write="]),
        ("imgfs umount ", ["dir,"]),
        ("imgfs info x", ["file,x"]),
    ],
)
def test_completion(words: str, found: list[str]) -> None:
    env = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    env |= {"_IMGFS_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [Path(sys.executable).parent / "imgfs"],
        env=env,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.stdout.splitlines(), done.stderr) == (found, "")
