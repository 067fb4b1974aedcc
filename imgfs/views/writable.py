"""What a view is that can be written, and one open file of a writer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable

from imgfs.errors import ImgfsError, again
from imgfs.image import Buffer
from imgfs.views.view import View

#: Raises ImgfsError (Busy, ReadOnlyView) where an open file for writing cannot be had now.
MayWrite = Callable[[], Awaitable[None]]

PIECE = 1 << 20  # bytes that are copied through memory at once


class Writable(View):
    """A view whose bytes can be changed.  Offsets and lengths are bytes, of any alignment.

    What a method has changed is read from then on, natively too: `map` (another one may take its
    place at any await) says so before it returns.  What was accepted may be on its way still:
    `settle` and `sync` wait for it.  A method that is cancelled has done all of what it was to do,
    or will do it, or has done nothing: never a part.  `size` follows.

    `failures` counts what went wrong after it had been accepted, `failure` is the last of it.
    """

    is_resizable = True  #: if not, open's O_TRUNC makes all of it zeroes
    failures = 0
    failure: ImgfsError | None = None
    writers = 0  #: how many have it open for writing
    may_write: MayWrite | None = None  #: asked at each open for writing

    async def open_for_writing(self) -> Writer:
        """One more writer; `Writer.close` must follow.

        Raises what `may_write` raises, SourceChanged, and ReadOnlyView or AccessDenied where the
        source refuses.
        """
        self.writers += 1  # before anything is asked: who takes a snapshot asks how many there are
        try:
            if self.may_write is not None:
                await self.may_write()
            await self._begin_writing()
        except BaseException:
            self.writers -= 1
            raise
        return Writer(self)

    @abstractmethod
    async def write(self, offset: int, data: Buffer) -> None:
        """`data` must not change afterwards.  What goes beyond the end makes the view longer.

        Raises NoSpace or TooLarge where it cannot be longer, SourceChanged, and what a failed
        write raises, if that is known already.
        """

    @abstractmethod
    async def zero(self, offset: int, length: int, *, punch: bool) -> None:
        """The range, which lies inside the view, reads as zeroes from now on.

        `punch`: and is to take no space, where that can be had.  Raises as `write` does.
        """

    async def write_zeroes(self, offset: int, length: int) -> None:
        """As `write` of so many zeroes; where it can be had they take no space."""
        end = min(offset + length, self.size)
        if offset + length > self.size:
            await self.resize(offset + length)
        if offset < end:
            await self.zero(offset, end - offset, punch=False)

    @property
    def stands_on(self) -> View | None:
        """Whose bytes may be `share`d."""
        return None

    async def share(
        self, offset: int, length: int, of: View | str | None, of_offset: int
    ) -> tuple[bool, int]:
        """Let a first part of the range be what is below it, if that is what `of` has there.

        None: if it is zeroes.  Returns whether it is now, and for how many bytes that is so: at
        least one.  Raises as `write` does.
        """
        return False, length

    async def take(self, offset: int, source: View, source_offset: int, length: int) -> int:
        """Copy a first part of a range of another view, or of another one of this; returns how many
        bytes: at least one.  Raises as `write` does, and what reading raises.
        """
        data = await source.answer(source.answered, source_offset, min(length, PIECE))
        await self.write(offset, data)
        return len(data)

    @abstractmethod
    async def resize(self, size: int) -> None:
        """Make it longer by zeroes, or cut it.  Raises as `write` does, and UnsupportedFeature."""

    @abstractmethod
    async def set_mtime(self, mtime_ns: int | None) -> None:
        """Until the next change of its bytes; None: the time now, and ctime follows either way.

        Raises as `write` does, and NotPermitted where the source refuses.
        """

    @abstractmethod
    async def settle(self) -> None:
        """Wait until all that was accepted has reached the source, or failed; raises neither."""

    @abstractmethod
    async def sync(self) -> None:
        """Make all that was accepted until now durable.

        Raises where that is not certain: NotDurable when the server has no means of it.  What
        failed after it had been accepted it does not raise: that is in `failures`.
        """

    async def _begin_writing(self) -> None:
        """The first or a further writer comes.  Raises where it cannot be."""

    def _end_writing(self) -> None:
        """A writer has gone."""


class Writer:
    """One open file of a writer.

    `sync` tells it once of each failure of what had been accepted, and `settle` until `sync` has.
    The file is closed more often than the writer knows of: by each child that had it, and its
    answer is thrown away there.
    """

    def __init__(self, view: Writable) -> None:
        """For `Writable.open_for_writing` only."""
        self.view = view
        self._told = view.failures
        self._is_open = True

    async def settle(self) -> None:
        """As the view's, and raises what failed since this writer was told last."""
        await self.view.settle()
        self._raise_untold()

    async def sync(self) -> None:
        """As the view's, and raises what failed since this writer was told last."""
        try:
            await self.view.sync()
        except ImgfsError:
            self._told = self.view.failures
            raise
        try:
            self._raise_untold()
        finally:
            self._told = self.view.failures

    def close(self) -> None:
        """Does not wait, and can be called again."""
        if self._is_open:
            self._is_open = False
            self.view.writers -= 1
            self.view._end_writing()

    def _raise_untold(self) -> None:
        if self._told != self.view.failures:
            failure = self.view.failure
            assert failure is not None
            raise again(failure)
