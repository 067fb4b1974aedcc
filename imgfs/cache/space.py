"""One limit for the block stores of all images of a mount.

Space is counted in blocks that may take room on disk.  A block is counted

    reserved    from before it is fetched ------> present    (`Account.keep`)
                       |                             |
                       v                             v
                    released                      evicted, or dropped with its image

and what is counted never exceeds the limit.  So what is released must have been punched, or never
written; a block that could not be punched stays counted.

Eviction takes what was used least recently, of whatever image.  It clears the present bits,
waits for readers that may still hold them, and punches, all while it holds the lock that
`reserve` takes: a block that is on its way out is not fetched anew before it is gone.
"""

from __future__ import annotations

import logging

import trio

from imgfs._native import _map

log = logging.getLogger(__name__)

EVICT_SHARE = 16  # a sixteenth of the limit goes at once, so that it is seldom done
FULL_PAUSE_S = 10.0  # after the disk was full


class CacheSpace:
    """`limit` and `used` are bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._accounts: list[Account] = []
        self._lock = trio.Lock()
        self._full_until = -1.0

    def attach(self, store: _map.Store) -> Account:
        """Count the store's blocks, none of which is present yet."""
        account = Account(self, store)
        self._accounts.append(account)
        return account

    def disk_is_full(self) -> None:
        """Do not fill the disk for a while: reads go on uncached."""
        if trio.current_time() >= self._full_until:
            log.warning("the cache's disk is full; reading without it for now")
        self._full_until = trio.current_time() + FULL_PAUSE_S

    async def _reserve(self, length: int) -> bool:
        if trio.current_time() < self._full_until or length > self.limit:
            return False
        async with self._lock:
            while self.used + length > self.limit:
                over = max(self.used + length - self.limit, self.limit // EVICT_SHARE)
                gone = await trio.to_thread.run_sync(self._evict, over)
                if not gone:
                    return False
                self.used -= gone
            self.used += length
            return True

    def _evict(self, length: int) -> int:
        """In a thread: take about `length` bytes away; how many it became."""
        aged = [(account.store.oldest_age(), account) for account in self._accounts]
        age, account = max(aged, key=lambda item: item[0], default=(-1, None))
        if account is None or age < 0:
            return 0
        return account.take_away(account.store.oldest(-(-length // account.store.block_size)))


class Account:
    """The blocks of one store.  Counts are blocks."""

    def __init__(self, space: CacheSpace, store: _map.Store) -> None:
        self.store = store
        self._space = space
        self._block = store.block_size

    def disk_is_full(self) -> None:
        """Writing one of the blocks failed so."""
        self._space.disk_is_full()

    async def reserve(self, count: int) -> bool:
        """Room for `count` blocks, by evicting others where needed; False: there is none."""
        return await self._space._reserve(count * self._block)

    def keep(self, runs: list[tuple[int, int]], reserved: int) -> None:
        """Of `reserved` blocks these were written: they are present now, the rest is released."""
        for first, count in runs:
            reserved -= self.store.set_present(first, count)
        self.release(reserved)

    def release(self, reserved: int) -> None:
        """Nothing was written into them."""
        self._space.used -= reserved * self._block

    async def give_back(self, first: int, count: int) -> None:
        """Release reserved blocks that were perhaps written.  Not cancelled."""
        with trio.CancelScope(shield=True):
            if await trio.to_thread.run_sync(self._punch, first, count):
                self.release(count)

    async def drop(self) -> None:
        """Take all present blocks away, for good.  Those reserved are their fetches' to release."""
        space = self._space
        with trio.CancelScope(shield=True):
            async with space._lock:
                blocks = -(-self.store.size // self._block)
                space.used -= await trio.to_thread.run_sync(self.take_away, [(0, blocks)])
                space._accounts.remove(self)

    def take_away(self, runs: list[tuple[int, int]]) -> int:
        """In a thread: these blocks are present no more; how many bytes that made."""
        cleared = [self.store.clear_present(first, count) for first, count in runs]
        self.store.quiesce()
        return sum(
            counted * self._block
            for run, counted in zip(runs, cleared, strict=True)
            if self._punch(*run)
        )

    def _punch(self, first: int, count: int) -> bool:
        start = first * self._block
        try:
            self.store.punch(start, min(count * self._block, self.store.size - start))
        except OSError as exc:
            log.warning("the cache cannot give space back: %s", exc.strerror)
            return False
        return True
