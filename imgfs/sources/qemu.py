"""Disks in formats that only qemu knows, through a qemu-nbd that is started for each.

It opens no file: what it reads it is given over a socket (imgfs.sources.nbd.export), wherever that
comes from, and what a header names is not followed by it but by whoever made the nodes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from imgfs.errors import ImgfsError, UnsupportedFeature, UsageError
from imgfs.formats.served import ALONE, Node
from imgfs.image import Buffer, Image
from imgfs.sources.nbd.command import Command
from imgfs.sources.nbd.errors import library
from imgfs.sources.nbd.export import Exports
from imgfs.sources.nbd.link import NbdLink
from imgfs.sources.nbd.settings import NbdSettings
from imgfs.sources.nbd.source import NbdSource
from imgfs.url.nbd import NbdCommand
from imgfs.url.text import one_line

PROGRAM = "qemu-nbd"
CONNECTIONS = 4
SECRET = "key"


class _Alone(Image):
    """A node's file with a header that names nothing below.

    Where it names something qemu looks for that, also when it is told what is below.
    """

    def __init__(self, node: Node) -> None:
        super().__init__(node.file.name, node.file.size)
        self._file = node.file
        self._at, self._mask = ALONE[node.format]

    async def _read(self, offset: int, length: int) -> Buffer:
        data = await self._file.read(offset, length)
        if offset >= self._at + len(self._mask) or offset + length <= self._at:
            return data
        found = bytearray(data)
        for at, kept in enumerate(self._mask, self._at - offset):
            if 0 <= at < length:
                found[at] &= kept
        return found


class QemuSource(NbdSource):
    """The disk of a node.  What becomes of the node's files is not its business."""

    def __init__(
        self,
        name: str,
        label: str,
        link: NbdLink,
        settings: NbdSettings,
        server: Command,
        exports: Exports,
    ) -> None:
        """For `open_by_qemu` only."""
        super().__init__(name, label, link, settings, server)
        self._exports = exports

    async def aclose(self) -> None:
        await super().aclose()
        self._exports.close()


async def open_by_qemu(
    node: Node, key_file: str | None, settings: NbdSettings, nursery: trio.Nursery
) -> QemuSource:
    """The disk in the node's file.  `key_file` is of LUKS; what it holds is all of the passphrase.

    Raises UnsupportedFeature with qemu's own words when it cannot open the disk, and what opening
    an NBD export raises.
    """
    library()
    files = [_Alone(each) if each.format in ALONE else each.file for each in node.chain()]
    name = node.file.name
    exports = await trio.to_thread.run_sync(Exports, files)
    described = json.dumps(_described(node, exports.path, 0))
    words = [PROGRAM, "--read-only", "--persistent", f"--shared={CONNECTIONS}"]
    if key_file is not None:
        words.append(f"--object=secret,id={SECRET},file={key_file.replace(',', ',,')}")
    command = NbdCommand((*words, f"json:{described}"))
    server = Command(command, Path("/"), nursery, (exports.fd,))
    # The files tell whether they are the same: one that had to be started again has the same disk.
    settings = replace(settings, pin="qemu", write=False)
    label = f"{PROGRAM} of {one_line(name)}"
    link = NbdLink(label, server.running, settings, nursery)
    nursery.start_soon(exports.serve)
    try:
        try:
            await link.open()
        except ImgfsError as exc:
            await server.explain(exc)
            raise
        return QemuSource(name, label, link, settings, server, exports)
    except BaseException as exc:
        link.end()
        await server.aclose()
        exports.close()
        if isinstance(exc, UsageError):
            raise UnsupportedFeature(f"{name}: is {node.format}: {_why(str(exc))}") from exc
        raise


def _described(node: Node, socket: str, number: int) -> dict[str, Any]:
    """As qapi/block-core.json has it (BlockdevOptions)."""
    server = {"type": "unix", "path": socket}
    file = {"driver": "nbd", "server": server, "export": str(number)}
    found: dict[str, Any] = {"driver": node.format, "file": file}
    if node.below is not None:
        found["backing"] = _described(node.below, socket, number + 1)
    if node.format == "luks":
        found["key-secret"] = SECRET
    return found


def _why(said: str) -> str:
    """Out of what a qemu-nbd that ended has said."""
    if shutil.which(PROGRAM) is None:
        return f"imgfs reads that by {PROGRAM}, which is not installed (Debian: qemu-utils)"
    _, _, words = said.partition(f"{PROGRAM}: ended by itself: ")
    # Failed to blk_new_open 'json:{...}': the reason
    return f"{PROGRAM} cannot open it: {words.rpartition(chr(39) + ': ')[2]}"
