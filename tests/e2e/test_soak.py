"""The soak, for seconds: python -m tests.soak is run for hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(420)  # it settles a dozen workers, which a busy machine takes its time for
def test_a_short_soak(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.soak", "--minutes", "0.1", "--work", tmp_path]
    pipe = subprocess.PIPE
    process = subprocess.Popen([str(w) for w in words], stdout=pipe, stderr=pipe, text=True)
    try:
        out, err = process.communicate(timeout=360)
    finally:
        process.terminate()  # it takes down its mount and servers
        process.wait(60)
    assert process.returncode == 0, out + err
    assert out.endswith("all right\n")
    assert not list(tmp_path.iterdir())
