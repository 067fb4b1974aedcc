"""The native core without Python, under gcc's sanitizers: memory, undefined behaviour, races."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "imgfs" / "_native"
CORE = [path for folder in ("store", "map") for path in sorted((NATIVE / folder).glob("*.c"))]
LONG = bool(os.environ.get("IMGFS_TEST_LONG"))
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def build(directory: Path, sanitizers: str) -> Path:
    program = directory / "core_driver"
    drivers = ["core_driver.c", "core_stress.c", "core_writes.c", "core_sums.c"]
    sources = [*(HERE / name for name in drivers), *CORE]
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    command = ["gcc", "-std=gnu11", "-g", "-O1", *WARNINGS, *flags]
    command += [f"-I{NATIVE}/{folder}" for folder in ("store", "map", "objects")]
    subprocess.run([*command, *sources, "-o", program, "-lpthread"], check=True, timeout=120)
    return program


def drive(program: Path, *words: object) -> None:
    settings = {
        "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    done = subprocess.run(
        [str(word) for word in (program, *words)],
        capture_output=True,
        text=True,
        timeout=600 if LONG else 100,
        check=False,
        env={**os.environ, **settings},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    print(done.stdout, end="")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("address"), "address,undefined")


@pytest.mark.timeout(700)
@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_model(address: Path, tmp_path: Path, seed: int) -> None:
    drive(address, "model", seed, 20000 if LONG else 4000, tmp_path)


@pytest.mark.timeout(700)
def test_stress(address: Path, tmp_path: Path) -> None:
    drive(address, "stress", 1, 200000 if LONG else 4000, tmp_path)


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("thread"), "thread")


@pytest.mark.timeout(700)
def test_writes(address: Path, tmp_path: Path) -> None:
    drive(address, "writes", 1, 100000 if LONG else 3000, tmp_path)


@pytest.mark.timeout(700)
def test_sums(address: Path, tmp_path: Path) -> None:
    drive(address, "sums", 1, 100000 if LONG else 3000, tmp_path)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("what", ["stress", "writes", "sums"])
def test_no_data_race(thread: Path, tmp_path: Path, what: str) -> None:
    # Its shadow memory has no place for what address randomization may choose.
    drive(Path("setarch"), "-R", thread, what, 1, 20000 if LONG else 400, tmp_path)
