"""A mount of one file over a base, to write on.

    python -m tests.native.write_mount MOUNTPOINT DIRECTORY THREADS

`disk` shows DIRECTORY/base, and what is written goes to DIRECTORY/data; `twin` is the same to read;
`status` is made when it is opened.  What the native side leaves to Python is done in the plainest
way.  With DIRECTORY/direct there, opens with O_DIRECT get direct_io.  With DIRECTORY/stuck there,
all writes are left to Python, which forgets them, but does nothing else for STUCK_S at the first.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from imgfs._native import _map, load_fuse

native = load_fuse()

import pyfuse3  # noqa: E402

BLOCK = _map.BLOCK
DISK, STATUS, TWIN = 2, 3, 4
STUCK_S = 2.0
NAMES = {b"disk": DISK, b"status": STATUS, b"twin": TWIN}


class Disk:
    """A map over `base`, written into `data`."""

    def __init__(self, directory: Path) -> None:
        base = directory / "base"
        size = base.stat().st_size
        self.directory = directory
        self.map, self.dirty = _map.SegmentMap(size), _map.SegmentMap(size)
        with base.open("rb") as file:
            self.base = _map.Store(file.fileno(), size, whole=True)
        self.fd = os.open(directory / "data", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.fd, size)
        self.top = _map.Store(self.fd, size, whole=True)
        self.map.set_target(self.top, self.dirty)
        self.taken = 0

    def read(self, offset: int, length: int) -> bytes:
        data = self.map.read(offset, length)
        if data is None:
            self.map.fill_store(offset, offset + length, self.base, offset)
            data = self.map.read(offset, length)
            assert data is not None
        return data

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > self.map.size:
            self.resize(end)
        while not self.map.write(offset, data):
            for block in {offset // BLOCK * BLOCK, end // BLOCK * BLOCK}:
                self.copy_up(block)

    def copy_up(self, block: int) -> None:
        length = min(BLOCK, self.map.size - block)
        if length > 0:
            self.map.copy_up(block, self.read(block, length))

    def zero(self, start: int, end: int) -> None:
        first, last = -(-start // BLOCK) * BLOCK, end // BLOCK * BLOCK
        if end == self.map.size:
            last = end
        if first >= last:
            self.write(start, bytes(end - start))
            return
        if start < first:
            self.write(start, bytes(first - start))
        self.map.zero(first, last)
        if last < end:
            self.write(last, bytes(end - last))

    def resize(self, size: int) -> None:
        old = self.map.size
        if size > old:
            os.ftruncate(self.fd, size)
            self.top.resize(size)
            self.map.resize(size)
            if old % BLOCK:
                self.copy_up(old // BLOCK * BLOCK)
        else:
            self.map.resize(size)
            self.top.quiesce()
            self.top.resize(size)
            os.ftruncate(self.fd, size)

    def sync(self) -> None:
        starts, _, _ = self.dirty.take()
        self.taken += len(starts)
        os.fdatasync(self.fd)
        self.dirty.settle()


class Operations(pyfuse3.Operations):
    enable_writeback_cache = False

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self.disk = disk
        self.status = b""
        self.written = 0

    def stuck(self) -> bool:
        return (self.disk.directory / "stuck").exists()

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = (
            stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o600
        )
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_size = self.disk.map.size if inode in {DISK, TWIN} else 0
        entry.st_blocks = self.disk.map.data_bytes() // 512 if inode == DISK else 0
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        if name not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(NAMES[name])

    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            self.disk.resize(attr.st_size)
        return await self.getattr(inode)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if inode == STATUS:
            disk = self.disk
            more = {
                "segments": len(disk.map),
                "python": self.written,
                "map_writes": disk.map.writes,
            }
            self.status = json.dumps({**native.status(), **more}).encode()
            return pyfuse3.FileInfo(fh=inode, direct_io=True)
        if self.stuck():
            self.disk.map.set_target(None)
        native.publish(inode, self.disk.map)
        direct = bool(flags & os.O_DIRECT) and (self.disk.directory / "direct").exists()
        return pyfuse3.FileInfo(fh=inode, keep_cache=not direct, direct_io=direct)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        if fh == STATUS:
            return self.status[offset : offset + size]
        length = max(0, min(size, self.disk.map.size - offset))
        return self.disk.read(offset, length) if length else b""

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        self.written += 1
        if not self.stuck():
            self.disk.write(offset, data)
        elif self.written == 1:
            time.sleep(STUCK_S)
        return len(data)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await trio.to_thread.run_sync(self.disk.sync)

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass

    def extra(self) -> Callable[..., None]:
        def handle(name: str, request: int, inode: int, fh: int, args: tuple[int, ...]) -> None:
            if name == "lseek":
                length = self.disk.map.size - args[0]
                self.disk.read(args[0], length)
                found = self.disk.map.seek(*args)
                assert found is not None
                native.reply_lseek(request, found)
            elif name == "fallocate" and args[0] in {3, 0x10, 0x11}:
                self.disk.zero(args[1], min(args[1] + args[2], self.disk.map.size))
                native.reply_err(request, 0)
            else:
                native.reply_err(request, errno.EOPNOTSUPP)

        return handle


async def until_ended() -> None:
    fd = native.interrupt_fd()
    while not native.status()["ended"]:
        await trio.lowlevel.wait_readable(fd)
        for _, unique in native.take_interrupts():
            native.retry_interrupt(unique)


async def serve(operations: Operations) -> None:
    native.set_extra_handler(operations.extra())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_ended)
        await pyfuse3.main(min_tasks=8, max_tasks=1000)
        nursery.cancel_scope.cancel()


def main(mountpoint: str, directory: str, threads: str) -> None:
    operations = Operations(Disk(Path(directory)))
    native.arm()
    pyfuse3.init(operations, mountpoint, {"fsname=write-test", "default_permissions"})
    assert native.hooked()
    native.start(int(threads))
    try:
        trio.run(serve, operations)
    finally:
        native.stop()
        pyfuse3.close(unmount=True)
        native.disarm()


if __name__ == "__main__":
    main(*sys.argv[1:])
