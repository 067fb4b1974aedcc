"""Where the blocks of one source lie on disk: a directory of its own, from when there is need.

Of a thousand images that are looked at few are read.  So a directory is opened when a block is to
be kept, or something that took long to find out; and before that only where an earlier mount may
have left one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from imgfs._native import _map
from imgfs.cache.directory import (
    BLOCK,
    CacheDirectory,
    directory_name,
    is_exact,
    open_directory,
)
from imgfs.cache.kept import Found, Kept
from imgfs.cache.space import Account, CacheSpace
from imgfs.errors import CacheError
from imgfs.extents import ExtentList
from imgfs.sources.base import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Left:
    """What an earlier mount left: blocks, and the source's map."""

    blocks: Found
    extents: ExtentList | None = None


class Home:
    """`account` is of the blocks in `store`, once the directory is open and where there is one.

    Without a root, which need not be there, there never is one.
    """

    def __init__(
        self, source: Source, space: CacheSpace, root: Path | None, limit: int | None
    ) -> None:
        """`limit` is of these blocks, in bytes, within the limit of all."""
        # Without a file, for now: no block is present before there is one.
        self.store = _map.Store(-1, source.size, BLOCK)
        self.account: Account | None = None
        self._source = source
        self._space = space
        self._root = root
        self._limit = limit
        self._opening = trio.Lock()
        self._directory: CacheDirectory | None = None
        self._tried = root is None
        # Only now: whole seconds that are over by the time of the first block may not have been.
        self._is_exact = is_exact(source)

    @property
    def may_be_kept(self) -> bool:
        """May an earlier mount have left something?"""
        if self._root is None:
            return False
        return self._space.may_know(self._root / directory_name(self._source))

    @property
    def is_open(self) -> bool:
        """Was the directory opened, or found not to be had?"""
        return self._tried

    def has_room(self, length: int) -> bool:
        """Can so many bytes be kept without evicting any?"""
        if self.account is not None:
            return self.account.has_room(length)
        if self._tried:
            return False
        most = self._space.limit if self._limit is None else self._limit
        return length <= most and self._space.used + length <= self._space.limit

    async def open(self, extents: ExtentList | None = None) -> Left | None:
        """Open the directory, if that was not tried already; what was in it.

        `extents` are kept there where there are none.  Where no directory can be had, which is
        logged, blocks are not kept.
        """
        if self._tried:
            return None
        async with self._opening:
            if self._tried:
                return None
            try:
                opened = await trio.to_thread.run_sync(self._open, extents)
            except CacheError as exc:
                log.warning("%s; reading without it", exc)
                return None
            finally:
                # Not before: who wants to keep a block waits for it.
                self._tried = True
            self._directory, kept, left = opened
            self._space.taken(self._directory.path)
            self.account = Account(
                self._space, self.store, kept, left.blocks.unverified, limit=self._limit
            )
            await self._space.trim()
            return left

    def _open(self, extents: ExtentList | None) -> tuple[CacheDirectory, Kept | None, Left]:
        """[blocks]"""
        assert self._root is not None
        directory = open_directory(self._root, self._source, is_kept=self._is_exact)
        try:
            self.store.attach(directory.blocks)
            if not directory.is_kept:
                return directory, None, Left(Found())
            kept = Kept(directory, self.store.size)
            try:
                left = Left(kept.load(), kept.load_extents())
                if left.extents is None and extents is not None and _is_told(extents):
                    kept.save_extents(extents)
            except OSError as exc:
                log.warning("%s: its cache cannot be read: %s", directory.path, exc.strerror)
                return directory, None, Left(Found())
            return directory, kept, left
        except BaseException:
            directory.close()
            raise

    async def save_extents(self, extents: ExtentList) -> None:
        """Keep them for a later mount.  Raises nothing: they can be found out again."""
        if not _is_told(extents):
            return
        if not self._tried:
            await self.open(extents)
        elif self.account is not None and self.account.kept is not None:
            try:
                await trio.to_thread.run_sync(self.account.kept.save_extents, extents)
            except OSError as exc:
                log.info("%s: its map cannot be kept: %s", self._source.name, exc.strerror)

    async def close(self, *, is_stale: bool) -> None:
        """Count the blocks no more; of a source that is stale nothing is of use any more."""
        self._tried = True
        with trio.CancelScope(shield=True):
            if self.account is not None:
                if is_stale:
                    self.account.kept = None
                await self.account.close()
            if self._directory is not None:
                if is_stale:
                    self._directory = replace(self._directory, is_kept=False)
                await trio.to_thread.run_sync(self._directory.close)
            await trio.to_thread.run_sync(self._close_store)

    def _close_store(self) -> None:
        """[blocks] Of what is not needed any more something may refer to the store for long."""
        self.store.clear_present(0, -(-self.store.size // BLOCK))
        self.store.quiesce()
        self.store.detach()


def _is_told(extents: ExtentList) -> bool:
    """That all is data a source says too that could not find out, this time."""
    return extents.stored_bytes() < extents.end
