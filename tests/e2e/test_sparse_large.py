"""sparse/ of a filesystem of 1 TiB behind a long line: it is there before one gets impatient."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.mounts import MIB, Mount
from tests.servers.delay_proxy import DelayProxy
from tests.servers.ssh import Sshd

TRIP_S = 0.02
#: Every group has a bitmap on the disk, and next to nothing else.
OPTIONS = ("-J", "size=4", "-O", "^metadata_csum,^uninit_bg", "-N", "131072")


def test_looking_at_the_files_takes_seconds(
    mount: Callable[..., Mount], sshd: Sshd, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(1 << 40)
    subprocess.run(["mkfs.ext4", "-q", "-F", *OPTIONS, disk], timeout=60, check=True)
    proxy = DelayProxy(sshd.port, TRIP_S)
    sshd.trust(proxy.port)
    try:
        point = mount(sshd.url(disk, proxy.port), "-o", sshd.options).point
        begun = time.monotonic()
        names = sorted(path.name for path in (point / "sparse").iterdir())
        assert proxy.down < MIB
        assert (point / "sparse/disk.raw").stat().st_blocks * 512 < 80 * MIB
        assert time.monotonic() - begun < 20
        # Nothing more is to be fetched for the others: `ls -l` is as quick as for a single file.
        fetched, begun = proxy.down, time.monotonic()
        for name in names:
            assert (point / "sparse" / name).stat().st_size < 1 << 41
        assert time.monotonic() - begun < 10
        assert proxy.down - fetched < 16 * MIB
    finally:
        proxy.close()
