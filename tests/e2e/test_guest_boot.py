"""A virtual machine boots from an image that is behind ssh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import Sshd

from . import guest
from .conftest import Mount

Mounter = Callable[..., Mount]


@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(guest.missing()), reason=guest.missing())
def test_boots_direct_and_through_the_page_cache(
    mount: Mounter, sshd: Sshd, tmp_path: Path
) -> None:
    disk, wanted = guest.make_disk(tmp_path)
    before = disk.read_bytes()
    m = mount(sshd.url(disk), "-o", sshd.options)
    for drive in (["cache=none"], []):
        said = guest.boot(m.point / "guest.raw", tmp_path, *drive)
        assert wanted in (line.strip().removesuffix("  -") for line in said.splitlines()), said
    (image,) = m.status()["images"].values()  # type: ignore[attr-defined]
    assert image["errors"] == 0
    # Only what the guest read was fetched.
    assert 0 < image["bytes_python"] < image["size"]
    assert (m.point / "guest.raw").read_bytes() == before
