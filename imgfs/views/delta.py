"""What a snapshot changes of its base, as a qcow2 file over the base."""

from __future__ import annotations

import trio

from imgfs._native import _map
from imgfs.formats.layout import About, Layout
from imgfs.pieces import PieceList, PieceListBuilder
from imgfs.views.encoded import EncodedView
from imgfs.views.overlay import OverlayView


async def delta(
    disk: OverlayView, name: str, identity: str, backing_name: str, backing_format: str
) -> EncodedView:
    """A qcow2 that holds only what the layers hold; the base is named as qemu takes it.

    Raises UnsupportedFeature where the name does not fit.
    """
    about = About(name, identity, disk.mtime_ns // 1_000_000_000)

    def layout() -> Layout:
        from imgfs.formats.qcow2_layout import delta_layout

        return delta_layout(changes(disk), disk.size, about, backing_name, backing_format)

    return EncodedView(name, disk, await trio.to_thread.run_sync(layout))


def changes(disk: OverlayView) -> PieceList:
    """BELOW is the base's, ZERO and DATA the layers'; all of the disk."""
    marked = disk.layered()
    builder = PieceListBuilder()
    step = 1 << 30
    while builder.end < disk.size:
        length = min(step, disk.size - builder.end)
        for start, end, kind, _ in marked.segments(builder.end, length):
            if kind == _map.STORE:
                builder.data(end, start)
            elif kind == _map.ZERO:
                builder.zero(end)
            else:
                builder.below(end)
    return builder.finish(disk.size)
