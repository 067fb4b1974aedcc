"""Opens the sources that a person names, and lists directories of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trio

from imgfs.config.options import Options
from imgfs.errors import UsageError
from imgfs.formats.served import Node
from imgfs.sources.base import Source
from imgfs.sources.listing import Listing
from imgfs.sources.local.file import open_file
from imgfs.sources.local.listing import LocalListing
from imgfs.url.nbd import NbdCommand, NbdUrl
from imgfs.url.source import ObjectUrl, parse

if TYPE_CHECKING:
    from imgfs.sources.bridge import Bridge
    from imgfs.sources.objects.upload import ObjectUpload
    from imgfs.sources.ssh.source import SshHosts

_ONLY_READ = "http and S3 can only be read; mount it without write=through"


class Sources:
    """Opens what a person names; one ssh connection a host for all of a process.

    `nursery` is for tasks that live as long as a source; it is cancelled before `aclose`, or after.
    """

    def __init__(self, options: Options, nursery: trio.Nursery) -> None:
        self._options = options
        self._nursery = nursery
        # A mount leaves it, but a command's words may be relative to it.
        self._directory = Path.cwd()
        self._bridge: Bridge | None = None
        self._hosts: SshHosts | None = None

    async def open(
        self, text: str, options: Options | None = None, directory: Path | None = None
    ) -> Source:
        """An open source; with options of its own, and where a command of it is to run.

        Raises UsageError and what opening raises.
        """
        options = options or self._options
        where = parse(text)
        if isinstance(where, str):
            return await open_file(
                where,
                extents=options.extents,
                write=options.write_through,
                among_others=options.among_others,
            )
        if isinstance(where, ObjectUrl):
            if options.write_through:
                raise UsageError(f"{where.text}: {_ONLY_READ}")
            from imgfs.sources.objects.source import open_object

            return await open_object(where, options.objects(), self._asyncio())
        if isinstance(where, NbdUrl | NbdCommand):
            from imgfs.sources.nbd.source import open_command, open_nbd

            settings = options.nbd()
            if isinstance(where, NbdUrl):
                return await open_nbd(where, settings, self._nursery)
            return await open_command(where, directory or self._directory, settings, self._nursery)
        write, among_others = options.write_through, options.among_others
        hosts = self._ssh()
        return await hosts.open(where, options.ssh(), write=write, among_others=among_others)

    async def open_by_qemu(self, node: Node, options: Options) -> Source:
        """The disk of a format that only qemu knows.  Raises as that says."""
        from imgfs.sources.qemu import open_by_qemu

        key = options.luks_key if node.format == "luks" else None
        return await open_by_qemu(node, key, options.nbd(), self._nursery)

    async def upload(self, where: ObjectUrl, options: Options, size: int) -> ObjectUpload:
        """An object of so many bytes, to be written.  Raises TooLarge, UsageError."""
        from imgfs.sources.objects.upload import ObjectUpload

        return ObjectUpload(where, options.objects(), self._asyncio(), size)

    async def listing(self, text: str) -> Listing | None:
        """The directory that this names, or None when it names an image.  Raises UsageError."""
        where = parse(text)
        if isinstance(where, str):
            return LocalListing(where) if where.endswith("/") else None
        if isinstance(where, NbdUrl | NbdCommand) or not where.is_directory:
            return None
        if isinstance(where, ObjectUrl):
            if self._options.write_through:
                raise UsageError(f"{where.text}: {_ONLY_READ}")
            from imgfs.sources.objects.listing import ObjectListing

            return ObjectListing(where, self._options.objects(), self._asyncio())
        return await self._ssh().list(where, self._options.ssh())

    async def aclose(self) -> None:
        if self._hosts is not None:
            await self._hosts.aclose()
        if self._bridge is not None:
            await self._bridge.aclose()

    # A local file must not pay for asyncio, asyncssh, libnbd or obstore.

    def _asyncio(self) -> Bridge:
        if self._bridge is None:
            from imgfs.sources.bridge import Bridge

            self._bridge = Bridge()
        return self._bridge

    def _ssh(self) -> SshHosts:
        if self._hosts is None:
            from imgfs.sources.ssh.source import SshHosts

            self._hosts = SshHosts(self._asyncio())
        return self._hosts
