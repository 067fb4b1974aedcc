"""Groups of logical volumes made by lvm2 itself, on loop devices and without device-mapper."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.guest.tools import loop, run

CRC_START = 0xF597A6CF


class Lvm:
    """Runs lvm commands that see nothing but these devices."""

    def __init__(self, devices: list[str], lock: Path) -> None:
        self.devices = devices
        accept = ",".join(f'"a|^{device}$|"' for device in devices)
        self._config = " ".join(
            [
                f'devices{{filter=[{accept},"r|.*|"] use_devicesfile=0}}',
                f'global{{locking_dir="{lock}" use_lvmpolld=0}}',
                "activation{udev_sync=0 udev_rules=0} backup{backup=0 archive=0}",
            ]
        )

    def __call__(self, command: str, *words: str | Path) -> str:
        name, *given = command.split()
        return run(name, "--config", self._config, "--driverloaded", "n", *given, *words)

    def create(self, command: str) -> None:
        self(f"lvcreate -an -Zn -Wn {command}")

    def extents(self) -> dict[str, list[tuple[str, int, int]]]:
        """By logical volume: the extents of each segment's stripes, (device, first, last)."""
        fields = "lv_name,seg_start_pe,seg_pe_ranges"
        found = json.loads(self(f"lvs -a --segments --reportformat json -o {fields}"))
        by_name: dict[str, list[tuple[int, str]]] = {}
        for each in found["report"][0]["seg"]:
            place = (int(each["seg_start_pe"]), each["seg_pe_ranges"])
            by_name.setdefault(each["lv_name"], []).append(place)
        return {
            name: [
                (device, int(first), int(last))
                for _, text in sorted(places)
                for device, first, last in re.findall(r"(\S+):(\d+)-(\d+)", text)
            ]
            for name, places in by_name.items()
        }


@contextmanager
def physical(paths: list[Path], lock: Path) -> Iterator[Lvm]:
    """The files as physical volumes to be."""
    if not paths:
        yield Lvm([], lock)
        return
    with loop(paths[0]) as device, physical(paths[1:], lock) as rest:
        yield Lvm([device, *rest.devices], lock)


def crc(data: bytes) -> int:
    """Bit by bit, as lvm2's sources say what it is."""
    value = CRC_START
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
    return value


def rewritten(disk: bytearray, pv: int, change: Callable[[str], str]) -> None:
    """Change the text of the physical volume at that byte; its checksums are put right."""
    area = pv + 4096
    at, length = struct.unpack_from("<QQ", disk, area + 40)
    text = disk[area + at : area + at + length].rstrip(b"\0").decode()
    data = change(text).encode() + b"\0"
    disk[area + at : area + at + len(data)] = data
    struct.pack_into("<QQI", disk, area + 40, at, len(data), crc(data))
    struct.pack_into("<I", disk, area, crc(bytes(disk[area + 4 : area + 512])))
