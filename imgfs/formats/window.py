"""The pieces around an offset that tables tell of before they say something that cannot be."""

from __future__ import annotations

from imgfs.errors import CorruptImage
from imgfs.pieces import PieceListBuilder


class Window:
    """Pieces appended to `builder` in order; those for which there is no room are reported bad.

    So what is damaged is damaged, and the rest of the same table can still be read.
    """

    def __init__(self, start: int, offset: int) -> None:
        """`offset`, at or after `start`, is what the pieces are wanted for."""
        self.builder = PieceListBuilder(start)
        self._offset = offset

    def bad(self, end: int, problem: str) -> bool:
        """From where the pieces end up to `end` nothing can be said.  Whether the pieces are to end
        there; else they begin anew at `end`.  CorruptImage when the wanted offset is in between."""
        if end <= self._offset:
            self.builder = PieceListBuilder(end)
            return False
        if self.builder.end <= self._offset:
            raise CorruptImage(problem)
        return True
