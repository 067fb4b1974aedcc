"""Large qcow2 images made by hand: their tables are whole, their data is a hole."""

from __future__ import annotations

import random
import sys
from array import array
from pathlib import Path

from imgfs.formats import qcow2_tables as t

CLUSTER = 65536
PER_TABLE = CLUSTER // t.ENTRY.size


def write_qcow2(path: Path, size: int, clusters: dict[int, int]) -> int:
    """A disk of `size` bytes with these clusters, which are the so-many-eth ones of the data in the
    file.  Returns the offset where the data begins."""
    l1_size = -(-size // (CLUSTER * PER_TABLE))
    l1_clusters = -(-l1_size * t.ENTRY.size // CLUSTER)
    tables = sorted({cluster // PER_TABLE for cluster in clusters})
    l2_at = (2 + l1_clusters) * CLUSTER
    data_at = l2_at + len(tables) * CLUSTER
    fixed = (t.MAGIC, 3, 0, 0, 16, size, 0, l1_size, 2 * CLUSTER, CLUSTER, 1, 0, 0)
    l1 = array("Q", bytes(l1_size * t.ENTRY.size))
    entries = {table: array("Q", bytes(CLUSTER)) for table in tables}
    for index, table in enumerate(tables):
        l1[table] = l2_at + index * CLUSTER | t.ENTRY_COPIED
    for cluster, place in clusters.items():
        entries[cluster // PER_TABLE][cluster % PER_TABLE] = (
            data_at + place * CLUSTER | t.ENTRY_COPIED
        )
    with path.open("wb") as file:
        file.write(t.HEADER_V2.pack(*fixed) + t.HEADER_V3.pack(0, 0, 0, 4, 104))
        file.seek(2 * CLUSTER)
        file.write(_swapped(l1))
        file.seek(l2_at)
        for table in tables:
            file.write(_swapped(entries[table]))
        file.truncate(data_at + (max(clusters.values()) + 1) * CLUSTER)
    return data_at


def _swapped(table: array[int]) -> bytes:
    if sys.byteorder == "little":
        table.byteswap()
    return table.tobytes()


def scattered(size: int, count: int, seed: int = 1) -> dict[int, int]:
    """`count` clusters anywhere on the disk, and anywhere in the file."""
    rng = random.Random(seed)
    places = list(range(count))
    rng.shuffle(places)
    return dict(zip(sorted(rng.sample(range(size // CLUSTER), count)), places, strict=True))
