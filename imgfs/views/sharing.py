"""What is below a snapshot's top layer, in the terms in which a view says whose bytes it shows."""

from __future__ import annotations

from collections.abc import Sequence

from imgfs._native import _map
from imgfs.overlays.layer import Layer
from imgfs.overlays.log import BLOCK
from imgfs.views.view import View

SHARED = 1 << 30  # bytes of which it is found out at once whether they need not be copied
MOST_LAYERS = 1000  # of a disk whose bytes are traced


def shared(
    lower: Sequence[Layer], base: View, size: int, offset: int, end: int, of: View | str | None
) -> tuple[int, _map.SegmentMap | None]:
    """Is what these layers and the base have from `offset` on, the begin of a block, `of`?

    Returns up to where that is answered, which is further, and where all of it is so a map that
    says where those bytes are: of whole blocks, or up to `size`, the end of the disk above.

    Nothing is so behind the end of any of the layers: what that one has not a longer one below may
    have, until the two are merged.
    """
    limit = min((layer.size for layer in lower), default=end)
    if limit <= offset or len(lower) > MOST_LAYERS:
        return end, None
    last = min(end, limit, offset + SHARED)
    if last < size:
        last -= last % BLOCK
    if last <= offset:
        return min(end, offset + BLOCK), None
    below = _map.SegmentMap(last)
    for layer in lower:
        below.fill_copy(offset, layer.state, offset, last - offset)
    stores = [layer.store for layer in lower]
    _, upto, whose = below.origins(offset, last - offset, stores)[0]
    found: View | str | None = None if whose == _map.ZEROES else base
    if whose >= 0:
        found = lower[whose].path.name
    elif whose == _map.OTHER:
        inside = max(offset, min(upto, base.size))
        if offset < inside:
            below.fill_copy(offset, base.map, offset, inside - offset)
        below.fill_zero(inside, upto)
        if of is None:
            _, upto, whose = below.origins(offset, upto - offset, stores)[0]
            found = None if whose == _map.ZEROES else base
    if found != of:
        return upto, None
    if upto < last:
        upto -= upto % BLOCK
    if upto == offset:
        return min(end, offset + BLOCK), None
    return upto, below
