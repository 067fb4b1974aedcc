"""What is copied: a disk as it is to be written, its map, and what tells both from all others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256

from imgfs.config.options import Options
from imgfs.copying.jobs import Job
from imgfs.copying.record import Facts
from imgfs.extents import ExtentList
from imgfs.library import shown_as
from imgfs.opener.disks import Opened
from imgfs.url.shown import shown_source
from imgfs.views.opening import Chain
from imgfs.views.sparse import SparseView, look
from imgfs.views.view import View


@dataclass(frozen=True, slots=True)
class Shown:
    """`view`, whose extents these are, is made of `disk`.  The facts are without a token."""

    chain: Chain
    disk: View
    view: View
    extents: ExtentList
    facts: Facts

    async def digest(self) -> str:
        """Two that have the same facts and the same of this have the same bytes.

        Raises what reading the disk's map raises.
        """
        hashed = sha256(repr((self.facts, self.disk.mtime_ns // 1_000_000_000)).encode())
        # Of a raw copy the map only says what need not be read.
        if self.facts.sparse or self.view is not self.disk:
            extents = await self.disk.extents(0, self.disk.size)
            hashed.update(extents.ends.tobytes())
            hashed.update(bytes(extents.flags))
        return hashed.hexdigest()


@asynccontextmanager
async def showing(
    opened: Opened, job: Job, options: Options, sparse: bool, *, anywhere: bool = False
) -> AsyncIterator[Shown]:
    """What the job copies, open for as long as the block runs.

    `anywhere`: its bytes are the same on every machine that sees the source, ids that formats have
    in them, too.  Raises what opening it and reading its map raise.
    """
    source = opened.disk(job.wish.source, replace(options, write=False), job.wish.directory)
    async with source as (url, chain):
        identity = chain.identity_anywhere
        token = chain.token(url)
        if anywhere and identity is not None:
            token = identity.token
        disk: View = chain.disk
        if sparse:
            disk = SparseView(disk.name, disk, (await look(disk)).free)
        destination = shown_source(job.destination)
        file_name = destination.rpartition("/")[2]
        seed = f"sparse {token}" if sparse else token
        view = await shown_as(disk, job.format, file_name, seed)
        facts = Facts(
            source=url,
            identity=identity.token if identity is not None else "",
            shown=" ".join((job.format, file_name, *chain.formats)),
            sparse=sparse,
            size=view.size,
            destination=destination,
            token="",
        )
        yield Shown(chain, disk, view, await view.extents(0, view.size), facts)
