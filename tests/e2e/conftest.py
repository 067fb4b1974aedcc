"""Whatever is mounted has a cache and a state of its own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own(own_directories: None) -> None:
    pass
