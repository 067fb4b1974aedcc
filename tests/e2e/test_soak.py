"""The soak, for seconds: python -m tests.soak is run for hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_short_soak(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.soak", "--minutes", "0.1", "--work", tmp_path]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all right\n")
    assert not list(tmp_path.iterdir())
