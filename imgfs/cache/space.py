"""One limit for the block stores of all images of a mount.

Space is counted in blocks that may take room on disk.  A block is counted

    reserved    from before it is fetched ------> present    (`Account.keep`)
                       |                             |   ^
                       v                             v   | (`Account.verify`)
                    released                      evicted  unverified: kept from an earlier mount

and what is counted never exceeds the limit.  So what is released must have been punched, or never
written; a block that could not be punched stays counted.  Directories of images that are not in
use now are counted too.

Eviction takes what was used least recently: directories that are not in use, then blocks that
were not used since the mount began, then the oldest of whatever image.  It clears the present
bits, waits for readers that may still hold them, and punches, all while it holds the lock that
`reserve` and `verify` take: a block that is on its way out is neither fetched anew nor found good
before it is gone.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from imgfs._native import _map
from imgfs.cache.directory import Entry, list_entries, remove
from imgfs.cache.kept import Kept, Run
from imgfs.cache.memory import Memory

log = logging.getLogger(__name__)

EVICT_SHARE = 16  # a sixteenth of the limit goes at once, so that it is seldom done
FULL_PAUSE_S = 10.0  # after the disk was full


class CacheSpace:
    """`limit` and `used` are bytes.  `root` is where the directories are, if there are any."""

    def __init__(self, limit: int, root: Path | None = None) -> None:
        self.limit = limit
        self.used = 0
        self.lock = trio.Lock()
        self.accounts: list[Account] = []
        self.memory = Memory(time.monotonic)
        self._root = root
        self._idle: list[Entry] = []
        self._known: set[Path] | None = None
        self._full_until = -1.0

    async def count_idle(self) -> None:
        """Count what lies in directories that nobody uses now; remove what is too much."""
        if self._root is not None:
            async with self.lock:
                found = await trio.to_thread.run_sync(list_entries, self._root)
                self._known = {entry.path for entry in found}
                self._idle = [entry for entry in found if not entry.in_use]
                self.used += sum(entry.used for entry in self._idle)
                await self._make_room(0)

    def may_know(self, path: Path) -> bool:
        """Was there such a directory when they were counted?"""
        return self._known is None or path in self._known

    def taken(self, path: Path) -> None:
        """This directory is in use from now on: its blocks are counted one by one."""
        for entry in self._idle:
            if entry.path == path:
                self._idle.remove(entry)
                self.used -= entry.used
                return

    def disk_is_full(self) -> None:
        """Do not fill the disk for a while: reads go on uncached."""
        if trio.current_time() >= self._full_until:
            log.warning("the cache's disk is full; reading without it for now")
        self._full_until = trio.current_time() + FULL_PAUSE_S

    async def reserve(self, length: int) -> bool:
        """Room for so many bytes, by evicting where needed; False: there is none."""
        if trio.current_time() < self._full_until or length > self.limit:
            return False
        async with self.lock:
            if not await self._make_room(length):
                return False
            self.used += length
            return True

    async def trim(self) -> None:
        """Evict what came to be counted over the limit."""
        async with self.lock:
            await self._make_room(0)

    async def _make_room(self, length: int) -> bool:
        """Under the lock."""
        while self.used + length > self.limit:
            over = max(self.used + length - self.limit, self.limit // EVICT_SHARE)
            gone = await trio.to_thread.run_sync(self._evict, over)
            if not gone:
                return False
            self.used -= gone
        return True

    def _evict(self, length: int) -> int:
        """In a thread: take about `length` bytes away; how many it became."""
        if self._idle:
            return self._evict_idle(self._idle.pop())
        for account in self.accounts:
            if account.unverified:
                return account.evict_unverified(length)
        aged = [(account.store.oldest_age(), account) for account in self.accounts]
        age, oldest = max(aged, key=lambda item: item[0], default=(-1, None))
        if oldest is None or age < 0:
            return 0
        return oldest.take_away(oldest.store.oldest(-(-length // oldest.store.block_size)))

    def _evict_idle(self, entry: Entry) -> int:
        assert self._root is not None
        try:
            remove(self._root, entry.path)  # False: another process has it now, and counts it
        except OSError as exc:
            log.warning("%s: cannot be removed from the cache: %s", entry.path, exc.strerror)
        return entry.used


@dataclass(eq=False)
class Account:
    """The blocks of one store.  Counts are blocks.

    `kept` is there when what is present is to be found again by a later mount; `checks` then
    holds the entries of blocks whose bytes are not known to be durable yet.
    """

    space: CacheSpace
    store: _map.Store
    kept: Kept | None = None
    unverified: int = 0
    checks: dict[int, int] = field(default_factory=dict)
    limit: int | None = None  #: bytes; most of this store, within the limit of all
    _reserved: int = 0

    def __post_init__(self) -> None:
        self._block = self.store.block_size
        self.space.used += self.unverified * self._block
        self.space.accounts.append(self)

    async def reserve(self, count: int) -> bool:
        """Room for `count` blocks, by evicting others where needed; False: there is none."""
        if not await self._reserve_of_own(count):
            return False
        if not await self.space.reserve(count * self._block):
            self._reserved -= count
            return False
        return True

    async def _reserve_of_own(self, count: int) -> bool:
        """Count them for this store's own limit."""
        space = self.space
        if self.limit is not None:
            most = self.limit // self._block
            async with space.lock:
                while (over := self.counted + count - most) > 0:
                    blocks = max(over, most // EVICT_SHARE)
                    gone = await trio.to_thread.run_sync(self._evict_own, blocks)
                    if not gone:
                        return False
                    space.used -= gone
                self._reserved += count
        else:
            self._reserved += count
        return True

    def _evict_own(self, blocks: int) -> int:
        if self.unverified:
            return self.evict_unverified(blocks * self._block)
        return self.take_away(self.store.oldest(blocks))

    def has_room(self, length: int) -> bool:
        """Can so many bytes be kept without evicting any?"""
        own = self.limit is None or self.counted * self._block + length <= self.limit
        return own and self.space.used + length <= self.space.limit

    @property
    def counted(self) -> int:
        """Blocks that count for this store's own limit."""
        return self.store.present + self.unverified + self._reserved

    def keep(self, runs: list[Run], reserved: int) -> None:
        """Of `reserved` blocks these were written: they are present now, the rest is released."""
        new = sum(self.store.set_present(first, count) for first, count in runs)
        self._reserved -= new
        self.release(reserved - new)

    def release(self, reserved: int) -> None:
        """Nothing was written into them."""
        self._reserved -= reserved
        self.space.used -= reserved * self._block

    async def give_back(self, first: int, count: int) -> None:
        """Release reserved blocks that were perhaps written.  Not cancelled."""
        with trio.CancelScope(shield=True):
            if await trio.to_thread.run_sync(self._punch, first, count):
                self.release(count)

    async def drop(self, first: int, count: int) -> None:
        """These blocks, present or not, are of no use any more.  Not cancelled."""
        space = self.space
        with trio.CancelScope(shield=True):
            async with space.lock:
                space.used -= await trio.to_thread.run_sync(self.take_away, [(first, count)])

    async def verify(self, first: int, count: int) -> None:
        """Blocks that are recorded and agree with their entries become present."""
        kept = self.kept
        if kept is None or not self.unverified:
            return
        async with self.space.lock:
            good, bad = await trio.to_thread.run_sync(kept.verify, self.store, first, count)
            for run in good:
                self.unverified -= self.store.set_present(*run)
            for run in bad:
                log.warning("%s: %d bad blocks; they are fetched again", kept.path, run[1])
                self.unverified -= run[1]
                if await trio.to_thread.run_sync(self._forget, run):
                    self.space.used -= run[1] * self._block

    async def record(self) -> None:
        """Make entries of all that is present, once it is durable.  Raises OSError."""
        kept = self.kept
        if kept is None or not self.checks:
            return
        checks = dict(self.checks)
        await trio.to_thread.run_sync(kept.sync_blocks)
        async with self.space.lock:
            # What was evicted in between is in `checks` no more.
            still = {block: check for block, check in checks.items() if block in self.checks}
            await trio.to_thread.run_sync(kept.record, still)
            for block in still:
                del self.checks[block]

    async def close(self) -> None:
        """Count the blocks no more.  Without `kept` they are given back."""
        space = self.space
        with trio.CancelScope(shield=True):
            async with space.lock:
                if self.kept is None:
                    blocks = -(-self.store.size // self._block)
                    space.used -= await trio.to_thread.run_sync(self.take_away, [(0, blocks)])
                else:
                    space.used -= (self.store.present + self.unverified) * self._block
                space.accounts.remove(self)

    def take_away(self, runs: list[Run]) -> int:
        """In a thread: these blocks are present no more; how many bytes that made."""
        cleared = [self.store.clear_present(first, count) for first, count in runs]
        self.store.quiesce()
        return sum(
            counted * self._block
            for run, counted in zip(runs, cleared, strict=True)
            if self._forget(run)
        )

    def evict_unverified(self, length: int) -> int:
        """In a thread: the same with about `length` bytes of unverified blocks."""
        assert self.kept is not None
        gone = 0
        wanted = -(-length // self._block)
        # Blocks that have become present are recorded as well: so look at more than that.
        for first, count in self.kept.recorded(wanted + self.store.present):
            for run in self.store.missing(first * self._block, self._bytes(first, count)):
                self.unverified -= run[1]
                gone += run[1] * self._block if self._forget(run) else 0
                if gone >= length:
                    return gone
        if not gone:
            self.unverified = 0  # there is nothing: never look again
        return gone

    def _forget(self, run: Run) -> bool:
        """Give blocks' space back; True when that worked."""
        first, count = run
        if self.kept is not None:
            for block in range(first, first + count):
                self.checks.pop(block, None)
            try:
                self.kept.forget(first, count)
            except OSError as exc:
                log.warning("the cache's records cannot be written: %s", exc.strerror)
        return self._punch(first, count)

    def _bytes(self, first: int, count: int) -> int:
        return min(count * self._block, self.store.size - first * self._block)

    def _punch(self, first: int, count: int) -> bool:
        try:
            self.store.punch(first * self._block, self._bytes(first, count))
        except OSError as exc:
            log.warning("the cache cannot give space back: %s", exc.strerror)
            return False
        return True
