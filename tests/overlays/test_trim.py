"""What is hidden by a layer that is written is given back: that, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgfs._native import _map
from imgfs.overlays.layer import Layer, Ranges, make_layer, open_layer
from imgfs.overlays.log import BLOCK
from imgfs.overlays.store import Base, SnapshotStore
from imgfs.overlays.trim import begin_trim, hidden

BLOCKS = 12
SIZE = BLOCKS * BLOCK
BASE = Base("/disk", SIZE, "raw", "stat", "1")
#: of each block: nothing, bytes, zeroes, what is below
KINDS = (_map.ASK, _map.STORE, _map.ZERO, _map.BELOW)

kinds = st.lists(st.sampled_from(KINDS), min_size=BLOCKS, max_size=BLOCKS)


def ranges(kinds: list[int]) -> Ranges:
    said = [n for n, kind in enumerate(kinds) if kind != _map.ASK]
    starts = array("Q", (n * BLOCK for n in said))
    return starts, array("Q", (at + BLOCK for at in starts)), bytes(kinds[n] for n in said)


def write(layer: Layer, blocks: list[int], byte: bytes = b"x") -> None:
    for n in blocks:
        layer.store.write(n * BLOCK, byte * BLOCK)
    layer.commit(ranges([_map.STORE if n in blocks else _map.ASK for n in range(BLOCKS)]), SIZE)


@settings(deadline=None)
@given(upper=kinds, dirty=kinds, lower=kinds, size=st.integers(1, BLOCKS + 3))
def test_what_is_hidden(
    tmp_path_factory: pytest.TempPathFactory,
    upper: list[int],
    dirty: list[int],
    lower: list[int],
    size: int,
) -> None:
    path = tmp_path_factory.mktemp("layer") / "x"
    make_layer(path, SIZE)
    layer = open_layer(path, writable=True)
    layer.commit(ranges(lower), SIZE)
    top = ranges([_map.ASK if kind == _map.BELOW else kind for kind in upper[:size]])
    starts, ends, kinds = hidden(top, ranges(dirty[:size]), layer, size * BLOCK)
    found = {at // BLOCK for a, b in zip(starts, ends, strict=True) for at in range(a, b, BLOCK)}
    assert set(kinds) <= {_map.BELOW}
    assert found == {
        n
        for n in range(min(size, BLOCKS))
        if upper[n] in (_map.STORE, _map.ZERO) and lower[n] == _map.STORE and dirty[n] != _map.BELOW
    }
    layer.close()


def test_space_is_given_back(tmp_path: Path) -> None:
    store = SnapshotStore("/disk", tmp_path)
    store.create(("x",), BASE, SIZE)
    (lower,) = store.open_layers(("x",), writable=True)
    write(lower, list(range(8)), b"l")
    top = store.freeze(("x",), SIZE, lower)
    write(top, [0, 1, 2, 6, 11], b"t")
    names = top.path.name, lower.path.name
    trim = begin_trim(store, *names, [{*names}])
    assert trim is not None
    assert begin_trim(store, *names, [{*names}]) is None  # one at a time
    trim.start(hidden(top.ranges(), ranges([]), lower, SIZE))
    while not trim.step():
        pass
    trim.close()
    assert (lower.path / "data").stat().st_blocks * 512 == 4 * BLOCK
    top.close()
    lower.close()
    layers = store.open_layers(("x",), writable=False)
    seen = _map.SegmentMap(SIZE)
    for layer in layers:
        seen.fill(*layer.ranges(), layer.store)
    assert seen.read(0, 8 * BLOCK) == b"".join(
        (b"t" if n in (0, 1, 2, 6) else b"l") * BLOCK for n in range(8)
    )
    assert list(layers[1].ranges()[0]) == [3 * BLOCK, 7 * BLOCK]
    for layer in layers:
        layer.close()


def test_who_needs_it_by_itself(tmp_path: Path) -> None:
    store = SnapshotStore("/disk", tmp_path)
    store.create(("x",), BASE, SIZE)
    (lower,) = store.open_layers(("x",), writable=True)
    write(lower, [0])
    top = store.freeze(("x",), SIZE, lower)
    names = top.path.name, lower.path.name
    assert begin_trim(store, *names, [{*names}, {lower.path.name}]) is None  # a frozen view
    assert begin_trim(store, "another", lower.path.name, []) is None
    assert begin_trim(store, lower.path.name, top.path.name, []) is None
    other = (
        "import sys; from pathlib import Path; from imgfs.overlays.layer import open_layer;"
        "open_layer(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", other, str(lower.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert begin_trim(store, *names, [{*names}]) is None
        process.communicate(timeout=20)
    store.create(("x", "y"), BASE, SIZE, top)  # of an empty top: y stands on the lower one
    assert begin_trim(store, *names, [{*names}]) is None
    store.delete(("x", "y"))
    trim = begin_trim(store, *names, [{*names}])
    assert trim is not None
    trim.close()
    top.close()
    lower.close()
