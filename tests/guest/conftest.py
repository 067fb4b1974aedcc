"""Images of filesystems are large, and a long run makes hundreds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def files_go_at_the_end(tmp_path: Path) -> Iterator[None]:
    """pytest itself would keep them until later runs."""
    yield
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
