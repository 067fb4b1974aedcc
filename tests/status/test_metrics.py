"""`.imgfs/metrics`: the text is in Prometheus's format, and says what the status says."""

from __future__ import annotations

import os
import re
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from imgfs.status.fields import STATES, FastPathStatus, ImageStatus, MountStatus
from imgfs.status.metrics import render

# Tighter than a reader has to be: what render() writes has no blanks to spare.
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*"'
LINE = re.compile(
    r"# HELP (?P<help>[a-z_]+) (?:[^\\\n]|\\[\\n])+"
    r"|# TYPE (?P<type>[a-z_]+) (?:counter|gauge)"
    rf"|(?P<sample>[a-z_]+)(?:\{{{LABEL}(?:,{LABEL})*\}})? [0-9]+(?:\.[0-9]+)?"
)

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Series:
    """Every series; fails where the text breaks a rule of the format or of the naming."""
    assert text.endswith("\n")
    text.encode()  # UTF-8 it is
    order: list[tuple[str, str]] = []
    for line in text.removesuffix("\n").split("\n"):
        match = LINE.fullmatch(line)
        assert match is not None, line
        assert match.lastgroup is not None
        order.append((match.lastgroup, match[match.lastgroup]))
    # Each metric is one group, its HELP before its TYPE before its samples.
    groups = list(dict.fromkeys(name for _, name in order))
    rank = ["help", "type", "sample"]
    assert order == sorted(order, key=lambda item: (groups.index(item[1]), rank.index(item[0])))
    assert all([kind for kind, n in order if n == name][:3] == rank for name in groups)
    found: Series = {}
    for family in text_string_to_metric_families(text):
        is_counter = family.type == "counter"
        assert family.documentation
        for sample in family.samples:
            assert sample.name.endswith("_total") == is_counter
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found  # one series given twice
            found[key] = sample.value
    assert len(found) == sum(kind == "sample" for kind, _ in order)
    return found


def status(**images: ImageStatus) -> MountStatus:
    return {
        "pid": 42,
        "source": "images.toml",
        "images": images,
        "cache": {"limit": 1 << 40, "used": 12345},
        "fast_path": {
            "ended": False,
            "error": 0,
            "queue_length": 1,
            "max_write": 1 << 20,
            "reads": 2,
            "bytes": 3,
            "spliced": 28,
            "seeks": 4,
            "lookups": 29,
            "queued": 5,
            "parked": 6,
            "interrupts": 7,
            "waited_for_disk": 8,
            "writes": 23,
            "bytes_written": 24,
            "zeroes": 25,
            "syncs": 26,
            "handed_over": 27,
            "writes_spliced": 29,
        },
    }


OPEN: ImageStatus = {
    "source": "ssh://kool/disk.img",
    "state": "open",
    "identity": "stat:1:2",
    "size": 10,
    "stored": 11,
    "bytes_native": 12,
    "bytes_python": 13,
    "bytes_fetched": (1 << 63) + 1,
    "reads": 15,
    "hits": 16,
    "misses": 17,
    "in_flight": 18,
    "fetching": 22,
    "window": 19,
    "cached": 20,
    "bytes_written": 28,
    "dirty": 29,
    "errors": 21,
    "last_error": 'a "text"\nof two lines',
    "left_whole": {"partition 1": "it is LUKS2"},
}


def test_whole_text() -> None:
    found = parsed(render(status(disk=OPEN)))
    image = {("image", "disk")}
    expected: Series = {
        ("imgfs_mount_info", frozenset({("pid", "42"), ("source", "images.toml")})): 1,
        (
            "imgfs_image_info",
            frozenset(image | {("source", "ssh://kool/disk.img"), ("identity", "stat:1:2")}),
        ): 1,
    }
    for state in ("open", "not_opened_yet", "failed", "stale", "unreachable"):
        expected["imgfs_image_state", frozenset(image | {("state", state)})] = state == "open"
    for origin, value in (("native", 12), ("python", 13)):
        labels = frozenset(image | {("origin", origin)})
        expected["imgfs_image_read_bytes_total", labels] = value
    for name, value in {
        "size_bytes": 10,
        "stored_bytes": 11,
        "fetched_bytes_total": (1 << 63) + 1,
        "written_bytes_total": 28,
        "dirty_bytes": 29,
        "reads_total": 15,
        "hits_total": 16,
        "misses_total": 17,
        "reads_in_flight": 18,
        "fetches_in_flight": 22,
        "readahead_window_bytes": 19,
        "cached_bytes": 20,
        "errors_total": 21,
    }.items():
        expected[f"imgfs_image_{name}", frozenset(image)] = value
    for name, value in {
        "cache_limit_bytes": 1 << 40,
        "cache_used_bytes": 12345,
        "fast_path_queue_length": 1,
        "fast_path_reads_total": 2,
        "fast_path_read_bytes_total": 3,
        "fast_path_spliced_total": 28,
        "fast_path_seeks_total": 4,
        "fast_path_lookups_total": 29,
        "fast_path_handed_over_total": 5,
        "fast_path_parked_total": 6,
        "fast_path_interrupts_total": 7,
        "fast_path_disk_waits_total": 8,
        "fast_path_writes_total": 23,
        "fast_path_written_bytes_total": 24,
        "fast_path_zeroes_total": 25,
        "fast_path_syncs_total": 26,
        "fast_path_spare_writes_total": 27,
        "fast_path_writes_spliced_total": 29,
    }.items():
        expected[f"imgfs_{name}", frozenset()] = value
    assert found == expected


def test_every_figure_is_there() -> None:
    """Who adds a figure to the status has to say what becomes of it here."""
    told_otherwise = {"last_error", "left_whole"}
    assert OPEN.keys() == get_type_hints(ImageStatus).keys()
    whole = render(status(disk=OPEN))
    for name in OPEN.keys() - told_otherwise:
        changed: ImageStatus = {**OPEN}  # type: ignore[typeddict-item]
        changed[name] = "stale" if name == "state" else 77 if name != "source" else "x"  # type: ignore[literal-required]
        if name == "identity":
            changed["identity"] = "other"
        assert render(status(disk=changed)) != whole, name
    untold = {"ended", "error", "max_write"}
    assert status()["fast_path"].keys() == get_type_hints(FastPathStatus).keys()
    for name in status()["fast_path"].keys() - untold:
        other = status(disk=OPEN)
        other["fast_path"][name] = 77  # type: ignore[literal-required]
        assert render(other) != whole, name


@pytest.mark.parametrize("state", STATES)
def test_state(state: str) -> None:
    found = parsed(render(status(disk={"source": "/x", "state": state})))  # type: ignore[typeddict-item]
    true = [labels for (name, labels), n in found.items() if name == "imgfs_image_state" and n]
    assert true == [frozenset({("image", "disk"), ("state", state.replace(" ", "_"))})]


def test_unopened_image_has_no_figures() -> None:
    found = parsed(render(status(disk={"source": "/x", "state": "not opened yet"})))
    names = {name for name, labels in found if ("image", "disk") in labels}
    assert names == {"imgfs_image_info", "imgfs_image_state"}


def test_no_identity_is_no_none() -> None:
    found = parsed(render(status(disk={**OPEN, "identity": None})))
    infos = [dict(labels) for name, labels in found if name == "imgfs_image_info"]
    assert [info["identity"] for info in infos] == [""]


def test_no_images_is_no_empty_metric() -> None:
    text = render(status())
    parsed(text)
    assert "imgfs_image" not in text


def images_of(found: Series) -> set[str]:
    return {dict(labels)["image"] for name, labels in found if name == "imgfs_image_info"}


def test_odd_names() -> None:
    names = {
        b'a "b"\\\n{},=': 'a "b"\\\n{},=',
        b"\xff": "%FF",
        b"%FF": "%25FF",
        b"%25FF": "%2525FF",
        b"100%": "100%",
        b"100%\xff": "100%%FF",
        "grün".encode(): "grün",
    }
    images = {os.fsdecode(name): OPEN for name in names}
    assert images_of(parsed(render(status(**images)))) == set(names.values())


@settings(deadline=None)
@given(st.sets(st.binary(max_size=6) | st.text('%2F\\n"', max_size=6).map(str.encode)))
def test_any_names_stay_apart(names: set[bytes]) -> None:
    images = {os.fsdecode(name): OPEN for name in names}
    assert len(images_of(parsed(render(status(**images))))) == len(names)
