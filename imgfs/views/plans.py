"""The plans that a view remembers, least recently used first out."""

from __future__ import annotations

from collections import OrderedDict

from imgfs.pieces import PieceList

MOST_PIECES = 1 << 16  # of all plans together
PIECE_BYTES = 32  # of one of them, or so


class Plans:
    """The last one, and others: together about `MOST_PIECES`, or literals as large as those."""

    def __init__(self) -> None:
        self._plans: OrderedDict[int, tuple[PieceList, int]] = OrderedDict()
        self._pieces = 0

    def at(self, offset: int) -> PieceList | None:
        """The one that has this offset in it."""
        for start, (plan, _) in self._plans.items():
            if start <= offset < plan.end:
                self._plans.move_to_end(start)
                return plan
        return None

    def add(self, plan: PieceList) -> None:
        weight = len(plan) + plan.literal_bytes // PIECE_BYTES
        _, replaced = self._plans.pop(plan.start, (plan, 0))
        self._plans[plan.start] = plan, weight
        self._pieces += weight - replaced
        while len(self._plans) > 1 and self._pieces > MOST_PIECES:
            _, (_, forgotten) = self._plans.popitem(last=False)
            self._pieces -= forgotten
