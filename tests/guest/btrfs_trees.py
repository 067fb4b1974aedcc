"""Gives a btrfs a block group tree, which mkfs.btrfs makes only from version 6.7 on.

For one that is new: all its trees are single leaves.  The kernel then mounts and fills it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

Key = tuple[int, int, int]

SUPERBLOCKS = (64 << 10, 64 << 20)
ROOT_TREE, EXTENT_TREE, FREE_SPACE_TREE, BLOCK_GROUP_TREE = 1, 2, 10, 11
ROOT_ITEM, METADATA_ITEM, BLOCK_GROUP_ITEM, FREE_SPACE_EXTENT = 132, 169, 192, 199
METADATA = 0x4
HEADER = 101


@dataclass
class Leaf:
    """A whole tree."""

    at: int  #: byte of the device, which is its address too where there is one copy
    header: bytes
    items: dict[Key, bytes]

    def packed(self, nodesize: int) -> bytes:
        heads, end, body = b"", nodesize - HEADER, b""
        for key in sorted(self.items):
            data = self.items[key]
            end -= len(data)
            heads += struct.pack("<QBQII", *key, end, len(data))
            body = data + body
        head = self.header[:96] + struct.pack("<IB", len(self.items), 0)
        return sealed(head + heads + bytes(nodesize - HEADER - len(heads) - len(body)) + body)


def sealed(block: bytes) -> bytes:
    return struct.pack("<I", google_crc32c.value(block[32:])) + bytes(28) + block[32:]


def leaf_of(data: bytes, at: int) -> Leaf:
    count, level = struct.unpack_from("<IB", data, 96)
    assert level == 0, "a tree of one block"
    items = {}
    for number in range(count):
        *key, start, length = struct.unpack_from("<QBQII", data, HEADER + 25 * number)
        items[key[0], key[1], key[2]] = data[HEADER + start : HEADER + start + length]
    return Leaf(at, data[:HEADER], items)


def add_block_group_tree(image: Path, offset: int) -> None:
    """To a filesystem with a free space tree and crc32c whose metadata is single; `offset` is how
    much further on than its addresses the device has it."""
    with image.open("r+b") as file:

        def read(at: int, length: int) -> bytes:
            file.seek(at)
            return file.read(length)

        def write(at: int, data: bytes) -> None:
            file.seek(at)
            file.write(data)

        superblock = read(SUPERBLOCKS[0], 4096)
        (nodesize,) = struct.unpack_from("<I", superblock, 148)

        def tree(address: int) -> Leaf:
            return leaf_of(read(address + offset, nodesize), address)

        def tree_of(number: int) -> Leaf:
            (address,) = struct.unpack_from("<Q", roots.items[number, ROOT_ITEM, 0], 176)
            return tree(address)

        roots = tree(struct.unpack_from("<Q", superblock, 80)[0])
        extents, space = tree_of(EXTENT_TREE), tree_of(FREE_SPACE_TREE)

        groups = {
            key: extents.items.pop(key) for key in [*extents.items] if key[1] == BLOCK_GROUP_ITEM
        }
        group = next(key for key, data in groups.items() if data[16] == METADATA)
        used, *rest = struct.unpack("<QQQ", groups[group])
        groups[group] = struct.pack("<QQQ", used + nodesize, *rest)

        free = next(
            key
            for key in sorted(space.items, reverse=True)
            if key[1] == FREE_SPACE_EXTENT and group[0] <= key[0] < group[0] + group[2]
        )
        del space.items[free]
        address = free[0]
        space.items[address + nodesize, FREE_SPACE_EXTENT, free[2] - nodesize] = b""

        generation = struct.unpack_from("<Q", superblock, 72)[0]
        extents.items[address, METADATA_ITEM, 0] = struct.pack(
            "<QQQBQ", 1, generation, 2, 176, BLOCK_GROUP_TREE
        )
        root = bytearray(roots.items[FREE_SPACE_TREE, ROOT_ITEM, 0])
        struct.pack_into("<Q", root, 160, generation)
        struct.pack_into("<Q", root, 176, address)
        struct.pack_into("<Q", root, 239, generation)
        roots.items[BLOCK_GROUP_TREE, ROOT_ITEM, 0] = bytes(root)
        header = bytearray(extents.header)
        struct.pack_into("<Q", header, 48, address)
        struct.pack_into("<QQ", header, 80, generation, BLOCK_GROUP_TREE)
        for leaf in (roots, extents, space, Leaf(address, bytes(header), groups)):
            write(leaf.at + offset, leaf.packed(nodesize))

        for at in SUPERBLOCKS:
            block = bytearray(read(at, 4096))
            for place, more in ((120, nodesize), (180, 8)):  # bytes_used, compat_ro_flags
                (value,) = struct.unpack_from("<Q", block, place)
                struct.pack_into("<Q", block, place, value + more)
            write(at, sealed(bytes(block)))
