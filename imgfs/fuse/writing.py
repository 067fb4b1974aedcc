"""The operations that change something: views that are Writable, directories with a Folder."""

from __future__ import annotations

import errno
import os
import stat
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import pyfuse3

from imgfs.errors import SourceChanged
from imgfs.fuse.boundary import guarded, native
from imgfs.tree.nodes import Folder, Node, Tree
from imgfs.views.copying import Progress, copy_range
from imgfs.views.view import View
from imgfs.views.writable import Writable, Writer

#: An open with one of these is a writer's.
WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC

# fallocate(2); Python's os module has none of them.
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10


@dataclass(slots=True)
class OpenWriter:
    """A handle, by which pyfuse3 tells no inode."""

    writer: Writer
    inode: int


class WritingOperations(pyfuse3.Operations):
    """Needs what is abstract here; `_writers` are the open files of writers, by their handles."""

    _tree: Tree

    def __init__(self) -> None:
        super().__init__()
        self._writers: dict[int, OpenWriter] = {}
        self._next_handle = 1 << 32  # apart from inodes, which are the handles of views

    @abstractmethod
    def _node(self, inode: int) -> Node: ...

    @abstractmethod
    async def _attributes(self, node: Node) -> pyfuse3.EntryAttributes: ...

    def _new_handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    async def _view_for_open(self, node: Node) -> View:
        """The node's view, which is in order; else a node of a new generation takes the name."""
        try:
            if node.prepare is not None:
                await node.prepare()
            assert node.view is not None
            await node.view.check_for_open()
            if node.view.is_nameless:
                raise SourceChanged(f"{node.view.name}: its name leads to another file, or none")
        except SourceChanged:
            # The kernel looks the name up again on ESTALE, and then finds the new one.
            if node.changed is not None:
                await node.changed(node)
            raise
        await node.view.prepare()
        return node.view

    async def _writable(self, node: Node) -> Writable:
        if node.children is not None:
            raise pyfuse3.FUSEError(errno.EISDIR)
        if node.make is not None:
            raise pyfuse3.FUSEError(errno.EROFS)
        view = await self._view_for_open(node)
        if not isinstance(view, Writable):
            raise pyfuse3.FUSEError(errno.EROFS)
        return view

    async def _open_writer(self, node: Node, flags: int) -> pyfuse3.FileInfo:
        view = await self._writable(node)
        writer = await view.open_for_writing()
        try:
            if flags & os.O_TRUNC:
                await self._empty(view)
        except BaseException:
            writer.close()
            raise
        # What is only written need not go through the page cache: cp and dd are twice as fast past
        # it.  And it lets writes of several threads go on at once.
        is_direct = bool(flags & os.O_DIRECT) or flags & os.O_ACCMODE == os.O_WRONLY
        handle = self._new_handle() | (native.DIRECT_HANDLE if is_direct else 0)
        self._writers[handle] = OpenWriter(writer, node.inode)
        native.publish(node.inode, view.map)
        node.open_files += 1
        return pyfuse3.FileInfo(fh=handle, direct_io=is_direct, keep_cache=not is_direct)

    @staticmethod
    async def _empty(view: Writable) -> None:
        """cp writes no zeroes to what it has opened with O_TRUNC: so they must be there."""
        if view.is_resizable:
            await view.resize(0)
        else:
            await view.zero(0, view.size, punch=True)

    def _inode_of(self, handle: int) -> int:
        opened = self._writers.get(handle)
        return handle if opened is None else opened.inode

    def _writer(self, handle: int) -> OpenWriter:
        try:
            return self._writers[handle]
        except KeyError:
            raise pyfuse3.FUSEError(errno.EBADF) from None

    @guarded
    async def write(self, handle: int, offset: int, data: bytes) -> int:
        must_sync = native.current_dsync()  # before anything is awaited
        opened = self._writer(handle)
        view = opened.writer.view
        before = view.map
        await view.write(offset, data)
        if must_sync:
            await opened.writer.sync()
        if view.map is not before:
            native.publish(opened.inode, view.map)
        return len(data)

    def note_failure(self, subject: object, error: str) -> None:
        """Count what a program is told; `subject` is an inode, or a handle."""
        if isinstance(subject, int):
            node = self._tree.nodes.get(self._inode_of(subject))
            if node is not None and node.trouble is not None:
                node.trouble.note(error)

    @guarded
    async def flush(self, handle: int) -> None:
        node = self._tree.nodes.get(self._inode_of(handle))
        if node is not None:
            node.closing += 1
        if handle in self._writers:
            await self._writers[handle].writer.settle()

    @guarded
    async def fsync(self, handle: int, datasync: bool) -> None:
        if handle in self._writers:
            await self._writers[handle].writer.sync()
        elif handle in self._tree.nodes:
            view = self._tree.nodes[handle].view
            if isinstance(view, Writable):
                await view.sync()

    def _release_writer(self, handle: int) -> None:
        opened = self._writers.pop(handle, None)
        if opened is not None:
            opened.writer.close()

    @guarded
    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        node = self._node(inode)
        if node.folder is None or fields.update_size:
            view = await self._to_set(node, fh)
            shown = await self._attributes(node)
            self._refuse_owner_and_mode(attr, fields, shown)
            if fields.update_size:
                await self._truncate(node, view, attr.st_size, fh)
            elif fields.update_mtime:
                await view.set_mtime(attr.st_mtime_ns)
        return await self._attributes(node)

    async def _to_set(self, node: Node, fh: int | None) -> Writable:
        """The view of an open file, or of one that is found by its name."""
        if fh in self._writers:
            return self._writers[fh].writer.view
        if not node.links and isinstance(node.view, Writable):
            return node.view
        return await self._writable(node)

    @staticmethod
    def _refuse_owner_and_mode(attr: Any, fields: Any, shown: pyfuse3.EntryAttributes) -> None:
        """As vfat does it: what it cannot keep and nobody misses is let go, the rest is EPERM."""
        refused = fields.update_uid and attr.st_uid != shown.st_uid
        refused |= fields.update_gid and attr.st_gid != shown.st_gid
        if fields.update_mode:
            special = stat.S_IMODE(attr.st_mode) & ~0o777
            refused |= bool(special) or not attr.st_mode & stat.S_IRUSR
        if refused:
            raise pyfuse3.FUSEError(errno.EPERM)

    async def _truncate(self, node: Node, view: Writable, size: int, fh: int | None) -> None:
        if fh in self._writers:
            await view.resize(size)
        else:
            writer = await view.open_for_writing()
            try:
                await view.resize(size)
                await writer.settle()
            finally:
                writer.close()
        native.publish(node.inode, view.map)

    async def _fallocate(self, inode: int, mode: int, offset: int, length: int) -> None:
        view = self._node(inode).view
        if not isinstance(view, Writable) or not view.writers:
            raise pyfuse3.FUSEError(errno.EBADF)
        end = offset + length
        if mode & ~KEEP_SIZE not in (0, PUNCH_HOLE, ZERO_RANGE):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        # Space cannot be promised, so to allocate changes nothing else than the size, and the time.
        if end > view.size and not mode & KEEP_SIZE:
            await view.resize(end)
        zeroed = min(end, view.size) - offset
        if mode & (PUNCH_HOLE | ZERO_RANGE) and zeroed > 0:
            await view.zero(offset, zeroed, punch=bool(mode & PUNCH_HOLE))
        else:
            await view.set_mtime(None)
        native.publish(inode, view.map)

    async def _copy_file_range(
        self, inode: int, done: Progress, offset: int, _: int, to: int, to_offset: int, length: int
    ) -> None:
        """From a view's bytes to the file that is open as `to`."""
        source, opened = self._node(inode).view, self._writer(to)
        if source is None:
            raise pyfuse3.FUSEError(errno.EXDEV)  # the kernel reads and writes then
        target = opened.writer.view
        if source is target and abs(offset - to_offset) < length:
            raise pyfuse3.FUSEError(errno.EINVAL)
        before = target.map
        try:
            await copy_range(source, offset, target, to_offset, length, done)
        finally:
            if target.map is not before:
                native.publish(opened.inode, target.map)

    def _folder(self, inode: int) -> tuple[Node, Folder]:
        node = self._node(inode)
        if node.folder is None:
            raise pyfuse3.FUSEError(errno.EROFS)
        return node, node.folder

    async def _entry(self, node: Node) -> pyfuse3.EntryAttributes:
        """For a reply by which the kernel gets to know the node."""
        entry = await self._attributes(node)
        node.lookups += 1
        return entry

    @guarded
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        _, folder = self._folder(parent)
        return await self._entry(await folder.mkdir(name))

    @guarded
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        _, folder = self._folder(parent)
        node = await folder.create(name)
        info = await self._open_writer(node, flags)
        try:
            return info, await self._entry(node)
        except BaseException:
            node.open_files -= 1
            self._release_writer(info.fh)
            raise

    @guarded
    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        _, folder = self._folder(parent)
        await folder.unlink(name)

    @guarded
    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        _, folder = self._folder(parent)
        await folder.rmdir(name)

    @guarded
    async def rename(
        self, old: int, name: bytes, new: int, new_name: bytes, flags: int, ctx: Any
    ) -> None:
        node, folder = self._folder(old)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise pyfuse3.FUSEError(errno.EINVAL)
        if self._node(new) is not node:
            raise pyfuse3.FUSEError(errno.EXDEV)
        await folder.rename(name, new_name, replace=not flags & pyfuse3.RENAME_NOREPLACE)
