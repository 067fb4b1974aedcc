"""`imgfs copy` over a slow line: what one image asks for does not keep the others waiting."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import fill
from tests.mounts import IMGFS, MIB
from tests.servers.delay_proxy import DelayProxy
from tests.servers.ssh import Sshd

BIG, SMALL = 24 * MIB, MIB // 4


@pytest.fixture
def far(sshd: Sshd) -> Iterator[DelayProxy]:
    proxy = DelayProxy(sshd.port, 0.02, 3e6)
    sshd.trust(proxy.port)
    yield proxy
    proxy.close()


def test_a_small_image_is_not_behind_all_of_a_large_one(
    sshd: Sshd, far: DelayProxy, tmp_path: Path, out: Path, state: Path
) -> None:
    """They share one connection; asked for at once, the large one would fill it for 8 seconds."""
    images = [tmp_path / "big.img", tmp_path / "small.img"]
    for path, size in zip(images, (BIG, SMALL), strict=True):
        fill(path, size)
    urls = [sshd.url(path, far.port) for path in images]
    words = ["copy", "-j", "2", "--progress=json", "-o", sshd.options, *urls, f"{out}/"]
    done = subprocess.run([*IMGFS, *words], capture_output=True, text=True, timeout=100, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1] == {"event": "end", "images": 2, "copied": 2, "failed": 0}
    at = next(
        i for i, event in enumerate(events) if event["event"] == "done" and event["name"] == "small"
    )
    moved = [event["done"] for event in events[:at] if event.get("name") == "big"]
    assert max(moved, default=0) < BIG // 2
    for path in images:
        assert (out / f"{path.stem}.raw").read_bytes() == path.read_bytes()
