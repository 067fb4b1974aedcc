"""Which layers must stay as they are, since a view that somebody may read stands on them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from imgfs.overlays.layer import Layer, make_layer, open_layer
from imgfs.overlays.log import BLOCK
from imgfs.sources.local.file import open_file
from imgfs.views.overlay import OverlayView, layers_in_use
from imgfs.views.raw import RawView


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Layer]:
    (tmp_path / "disk").write_bytes(bytes(BLOCK))
    make_layer(tmp_path / "only", BLOCK)
    layer = open_layer(tmp_path / "only")
    yield layer
    layer.close()


def of(layer: Layer) -> int:
    return sum(layer.path.name in names for names in layers_in_use())


async def base_of(layer: Layer) -> RawView:
    return RawView(await open_file(str(layer.path.with_name("disk"))))


def test_whoever_can_be_reached_is_there(layer: Layer) -> None:
    """Of many that come and go, whether or not the collector has come."""
    below, kept = trio.run(base_of, layer), []
    gc.disable()
    try:
        for n in range(500):
            view = OverlayView("x", BLOCK, [layer], below)
            view.myself = view  # type: ignore[attr-defined]  # only the collector ends it
            if n % 10 == 0:
                kept.append(view)
            assert of(layer) >= len(kept)
        assert {id(view) for view in kept} <= {id(view) for view in overlay_views()}
    finally:
        gc.enable()
    del view
    gc.collect()
    assert of(layer) == len(kept)


def overlay_views() -> list[OverlayView]:
    from imgfs.views.overlay import _views

    return _views.all()


def test_loops_in_several_threads(layer: Layer) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            below = trio.run(base_of, layer)
            for _ in range(300):
                view = OverlayView("x", BLOCK, [layer], below)
                assert of(layer) >= 1
                del view
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed
