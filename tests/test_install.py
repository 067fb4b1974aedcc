"""What is in an sdist and in a wheel, and what `imgfs install-files` makes of that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
UNITS = {"imgfs@.service", "srv-images.automount", "srv-images.mount"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an sdist, and a wheel made from that."""
    directory = tmp_path_factory.mktemp("dist")
    tree = directory / "tree"
    unwanted = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "build", "dist", "__pycache__")
    shutil.copytree(REPOSITORY, tree, ignore=unwanted)
    done = subprocess.run(
        [sys.executable, "-m", "build", "-o", directory, tree],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def site(made: Path) -> Path:
    """The wheel, unpacked."""
    with zipfile.ZipFile(next(made.glob("*.whl"))) as wheel:
        wheel.extractall(made / "site")
    return made / "site"


def test_sdist(made: Path) -> None:
    with tarfile.open(next(made.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    headers = {str(each.relative_to(REPOSITORY)) for each in REPOSITORY.glob("imgfs/**/*.h")}
    assert headers <= names
    assert {f"contrib/systemd/{unit}" for unit in UNITS} <= names
    assert "LICENSE" in names


def test_wheel(site: Path) -> None:
    names = [str(each.relative_to(site)) for each in site.rglob("*") if each.is_file()]
    assert not [name for name in names if name.endswith((".c", ".h"))]
    assert not [name for name in names if name.startswith(("tests", "contrib"))]
    assert {name for name in names if name.endswith("LICENSE")}
    assert "imgfs/py.typed" in names


def install(site: Path, *words: object) -> list[Path]:
    done = subprocess.run(
        [sys.executable, "-m", "imgfs.cli.main", "install-files", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [Path(line) for line in done.stdout.splitlines()]


def test_install_files(site: Path, tmp_path: Path) -> None:
    found = install(site, "--prefix", "/usr", "--destdir", tmp_path, "--program", "/usr/bin/imgfs")
    paths = {str(path.relative_to(tmp_path)) for path in found}
    assert "usr/lib/systemd/system/imgfs@.service" in paths
    assert "usr/lib/systemd/user/imgfs@.service" in paths
    assert "usr/share/doc/imgfs/examples/srv-images.automount" in paths
    for path in (
        "usr/share/man/man1/imgfs.1",
        "usr/share/man/man5/imgfs.toml.5",
        "usr/share/bash-completion/completions/imgfs",
        "usr/sbin/mount.imgfs",
    ):
        assert path in paths
    unit = (tmp_path / "usr/lib/systemd/system/imgfs@.service").read_text()
    assert "ExecStart=imgfs mount" in unit  # systemd finds it there by itself
    assert os.access(tmp_path / "usr/sbin/mount.imgfs", os.X_OK)


def test_a_program_that_systemd_would_not_find(site: Path, tmp_path: Path) -> None:
    program = "/opt/imgfs/bin/imgfs"
    install(site, "--prefix", tmp_path, "--program", program)
    unit = (tmp_path / "lib/systemd/system/imgfs@.service").read_text()
    assert f"ExecStart={program} mount" in unit
    assert f"exec {program} mount" in (tmp_path / "sbin/mount.imgfs").read_text()


def test_mount_imgfs_hands_over_what_mount_says(site: Path, tmp_path: Path) -> None:
    program = tmp_path / "imgfs"
    program.write_text('#!/bin/sh\nfor word; do echo "[$word]"; done\n')
    program.chmod(0o755)
    install(site, "--prefix", tmp_path, "--program", program)

    def said(*words: str) -> str:
        command = [tmp_path / "sbin/mount.imgfs", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout

    assert said("a b", "/mnt", "-n", "-v", "-o", "rw,lazy") == (
        "[mount]\n[a b]\n[/mnt]\n[-o]\n[rw,lazy]\n"
    )
    assert said("a", "/mnt") == "[mount]\n[a]\n[/mnt]\n"
    assert said("a", "/mnt", "-f", "-o", "rw") == ""


def test_a_missing_libfuse_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=REPOSITORY,
        env={**os.environ, "PKG_CONFIG_LIBDIR": str(tmp_path), "PKG_CONFIG_PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "libfuse3-dev" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
