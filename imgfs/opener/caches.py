"""The caches of a mount's images, and what they share."""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from imgfs.cache.cached import CachedImage, Policy, open_cached
from imgfs.cache.directory import default_limit, make_root, sweep
from imgfs.cache.space import CacheSpace
from imgfs.config.options import Options
from imgfs.errors import CacheError
from imgfs.sources.base import Source
from imgfs.status.fields import CacheStatus

log = logging.getLogger(__name__)


class Caches:
    """What the images of a mount share: the cache's place on disk, and its limit."""

    def __init__(self, options: Options) -> None:
        self._limit = options.cache_size
        self._root: Path | None = None
        self._space: CacheSpace | None = None
        self._making = trio.Lock()

    async def hold(
        self,
        source: Source,
        policy: Policy,
        task_status: trio.TaskStatus[CachedImage] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keep a cache for the source until that is another.  Raises nothing."""
        space = await self._made()
        async with open_cached(source, space, self._root, policy) as image:
            task_status.started(image)
            await image.is_over.wait()

    async def _made(self) -> CacheSpace:
        async with self._making:
            if self._space is None:
                limit = self._limit
                try:
                    self._root = make_root()
                    await trio.to_thread.run_sync(sweep, self._root)
                    if limit is None:
                        limit = default_limit(self._root)
                except CacheError as exc:
                    log.warning("%s; reading without it", exc)
                self._space = CacheSpace(limit or 0, self._root)
                await self._space.count_idle()
            return self._space

    def status(self) -> CacheStatus:
        """Bytes."""
        space = self._space or CacheSpace(0)
        return {"limit": space.limit, "used": space.used}
