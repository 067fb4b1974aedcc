"""The pyfuse3 adapter: requests to the tree's nodes and back."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pyfuse3
import trio

from imgfs.config.options import Options, owner
from imgfs.errors import ImgfsError, OutOfRange
from imgfs.fuse.boundary import guard, guarded, native
from imgfs.fuse.writing import WRITING, WritingOperations
from imgfs.image import Buffer
from imgfs.tree.nodes import ROOT, Node, Tree
from imgfs.views.copying import Progress
from imgfs.views.showing import Shape
from imgfs.views.view import View
from imgfs.views.writable import Writable

_BLOCK = 512  # what st_blocks counts in
_SECOND = 10**9  # in ns
MOST_LISTED = 16


async def answer(view: View, offset: int, size: int) -> Buffer:
    """What the view has of the range; also when it is cut while it is read."""
    inside = max(0, min(size, view.size - offset))
    if not inside:
        return b""
    try:
        return await view.answer(view.answered, offset, inside)
    except OutOfRange:
        if offset + inside <= view.size:
            raise
        return await answer(view, offset, size)


class Operations(WritingOperations):
    """Operations on a tree.

    When a view's source turned out to be another the node's `changed` puts a node of a new
    generation under the name.
    """

    enable_writeback_cache = False

    def __init__(
        self,
        tree: Tree,
        options: Options,
        ready: Callable[[], None],
    ) -> None:
        super().__init__()
        self._tree = tree
        self._owner = owner(options)
        self._umask = options.umask
        self._ready = ready
        self._made: dict[int, bytes] = {}
        self._listed: dict[int, list[tuple[bytes, Node]]] = {}  # directories that are being read
        self._start_ns = time.time_ns()
        tree.withdraw_name = native.withdraw_name

    def init(self) -> None:
        self._ready()

    def _node(self, inode: int) -> Node:
        try:
            return self._tree.nodes[inode]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    async def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        if node.prepare is not None and node.shape is None:
            await node.prepare()
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_uid, entry.st_gid = self._owner
        entry.attr_timeout = 1
        entry.entry_timeout = 0 if node.is_fleeting else 1
        mtime_ns = ctime_ns = self._start_ns
        if node.children is not None:
            entry.st_mode = stat.S_IFDIR | self._mode(0o555 if node.folder is None else 0o755)
            entry.st_nlink = 2
            mtime_ns = ctime_ns = self._start_ns if node.mtime_ns is None else node.mtime_ns
        elif (shape := node.view or node.shape) is not None:
            if node.view is not None:
                await node.view.measure()
            mtime_ns, ctime_ns = shape.mtime_ns, shape.ctime_ns
            # What the owner may not do at the source he may not do here.
            able = 0o600 if isinstance(shape, Writable) else 0o400
            entry.st_mode = stat.S_IFREG | self._mode(shape.mode & able)
            entry.st_size = shape.size
            entry.st_blocks = -(-shape.stored_bytes // _BLOCK)
            entry.st_blksize = 128 << 10
            entry.st_nlink = 1 if node.links else 0  # nameless, and open yet
        else:
            entry.st_mode = stat.S_IFREG | self._mode(0o400)
            # 0 where it is different each time, as in /proc.
            entry.st_size = await node.made_size() if node.made_size is not None else 0
            entry.st_blocks = -(-entry.st_size // _BLOCK)
        entry.st_atime_ns = entry.st_mtime_ns = mtime_ns
        entry.st_ctime_ns = ctime_ns
        return entry

    def _mode(self, bits: int) -> int:
        if self._umask is None:
            return bits
        return (bits >> 6) * 0o111 & ~self._umask

    @guarded
    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        directory = self._node(parent)
        directory.requests += 1
        try:
            while True:
                node = await self._named(directory, name)
                entry = await self._attributes(node)
                # While that waited a new generation may have taken the name.
                if node.inode in self._tree.nodes:
                    node.lookups += 1
                    self._publish(directory, name, node, entry)
                    if node.renew is not None and node.published is not None:
                        await self._publish_all(directory)
                    return entry
        finally:
            directory.requests -= 1

    def _publish(
        self, directory: Node, name: bytes, node: Node, entry: pyfuse3.EntryAttributes
    ) -> None:
        """Have the next look-ups answered natively, where the answer stays the same."""
        if node.published is not None or not entry.entry_timeout or directory.folder is not None:
            return
        if node.children is None:
            if not isinstance(node.view or node.shape, View | Shape):
                return
            if isinstance(node.view, Writable) or (node.view is not None and node.view.stale):
                return
            siblings = directory.siblings
            if node.renew is not None and (siblings is None or not siblings.is_current(node)):
                return
        inode = directory.inode
        about = (
            *(node.inode, entry.generation, entry.st_size, entry.st_blocks, entry.st_mode),
            *(entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_blksize),
        )
        times = divmod(entry.st_mtime_ns, _SECOND), divmod(entry.st_ctime_ns, _SECOND)
        until = int(entry.entry_timeout), int(entry.attr_timeout)
        if native.publish_name(inode, name, about, *times, until):
            node.published = inode, name

    async def _publish_all(self, directory: Node) -> None:
        """Whoever asks for one of the formats' files asks for the others next."""
        try:
            if directory.siblings is None or not await directory.siblings.complete():
                return
            for name, node in list((directory.children or {}).items()):
                if node.published is None and (node.children is not None or node.renew is not None):
                    self._publish(directory, name, node, await self._attributes(node))
        except ImgfsError:
            pass  # what is wrong with them is told to whoever asks for them

    async def _named(self, directory: Node, name: bytes) -> Node:
        if directory.children is None:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        if name not in directory.children and directory.refresh is not None:
            await directory.refresh()
        node = directory.children.get(name)
        if node is not None and node.prepare is not None and node.shape is None:
            await node.prepare()  # by which another node may have taken the name, or nobody has it
            node = (directory.children or {}).get(name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return node if node.renew is None else await node.renew()

    @guarded
    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return await self._attributes(self._node(inode))

    @guarded
    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    @guarded
    async def readdir(self, handle: int, start: int, token: Any) -> None:
        directory = self._node(handle)
        if start == 0 and directory.refresh is not None:
            await directory.refresh()
        children = self._listed.pop(handle, None)
        if children is None or start == 0:
            children = sorted((directory.children or {}).items())
        entry = pyfuse3.EntryAttributes()
        for position in range(start, len(children)):
            name, node = children[position]
            entry.st_ino = node.inode
            entry.st_mode = stat.S_IFREG if node.children is None else stat.S_IFDIR
            if not pyfuse3.readdir_reply(token, name, entry, position + 1):
                self._keep_listed(handle, children)
                return

    def _keep_listed(self, inode: int, children: list[tuple[bytes, Node]]) -> None:
        """For whoever reads on: of a long directory each answer has a small part.

        Two that read it at a time have the same list, or the second one's.
        """
        self._listed[inode] = children
        if len(self._listed) > MOST_LISTED:
            del self._listed[next(iter(self._listed))]

    @guarded
    async def releasedir(self, handle: int) -> None:
        pass

    @guarded
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        node = self._node(inode)
        if flags & WRITING:
            return await self._open_writer(node, flags)
        if node.make is not None:
            handle = self._new_handle()
            self._made[handle] = await node.make()
            return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)
        view = await self._view_for_open(node)
        native.publish(inode, view.map)
        node.open_files += 1
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @guarded
    async def read(self, handle: int, offset: int, size: int) -> bytes:
        if handle in self._made:
            return self._made[handle][offset : offset + size]
        opened = self._writers.get(handle)
        view = self._view(handle) if opened is None else opened.writer.view
        # pyfuse3 takes any buffer, and a copy would cost more than the rest of this.
        return cast(bytes, await answer(view, offset, size))

    def _view(self, inode: int) -> View:
        view = self._node(inode).view
        if view is None:
            raise pyfuse3.FUSEError(errno.EISDIR)
        return view

    @guarded
    async def release(self, handle: int) -> None:
        if self._made.pop(handle, None) is not None:
            return
        node = self._tree.nodes.get(self._inode_of(handle))
        if node is not None:
            node.note_release()
        self._release_writer(handle)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            if self._tree.forget(inode, count):
                native.retract(inode)

    @guarded
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        sizes = {id(n.view): n.view.size for n in self._tree.nodes.values() if n.view}
        data.f_blocks = -(-sum(sizes.values()) // 4096)
        data.f_files = len(self._tree.nodes)
        data.f_namemax = 255
        return data

    def extra(self, nursery: trio.Nursery) -> Callable[..., None]:
        """The handler of what pyfuse3 has no handler for."""

        def handle(name: str, request: int, inode: int, fh: int, args: tuple[int, ...]) -> None:
            number = native.current_unique(), native.current_pid()
            if name == "lseek":
                nursery.start_soon(self._lseek, request, number, inode, fh, args)
            elif name == "fallocate":
                nursery.start_soon(self._serve_fallocate, request, number, inode, args)
            else:
                nursery.start_soon(self._serve_copy, request, number, inode, args)

        return handle

    async def _lseek(
        self, request: int, number: tuple[int, int], inode: int, fh: int, args: tuple[int, ...]
    ) -> None:
        offset, whence = args

        async def answer() -> int:
            if fh in self._made:
                end = len(self._made[fh])
                if not 0 <= offset < end:
                    raise pyfuse3.FUSEError(errno.ENXIO)
                return offset if whence == os.SEEK_DATA else end
            view = self._view(inode)
            await view.check_for_open()
            await view.prepare()
            try:
                found = await view.seek(offset, whence)
            except OSError as exc:
                raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None
            if found is None:
                raise pyfuse3.FUSEError(errno.EIO)
            return found

        try:
            note = partial(self.note_failure, inode)
            native.reply_lseek(request, await guard("lseek", answer, number, note))
        except pyfuse3.FUSEError as exc:
            native.reply_err(request, exc.errno)

    async def _serve_fallocate(
        self, request: int, number: tuple[int, int], inode: int, args: tuple[int, ...]
    ) -> None:
        async def change() -> None:
            await self._fallocate(inode, *args)

        try:
            await guard("fallocate", change, number, partial(self.note_failure, inode))
        except pyfuse3.FUSEError as exc:
            native.reply_err(request, exc.errno)
        else:
            native.reply_err(request, 0)

    async def _serve_copy(
        self, request: int, number: tuple[int, int], inode: int, args: tuple[int, ...]
    ) -> None:
        progress = Progress()

        async def copy() -> None:
            await self._copy_file_range(inode, progress, *args[:-1])

        try:
            await guard("copy_file_range", copy, number, partial(self.note_failure, args[2]))
        except pyfuse3.FUSEError as exc:
            if not progress.done:
                native.reply_err(request, exc.errno)
                return
        native.reply_write(request, progress.done)


__all__ = ["ROOT", "Operations"]
