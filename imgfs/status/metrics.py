"""`.imgfs/metrics`: a mount's status as Prometheus's text format, version 0.0.4.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/; the names follow
https://prometheus.io/docs/practices/naming/: base units, and counters end in _total.  The text of
the last error is left out: as a label each new text would be a new series for ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from imgfs.status.fields import STATES, MountStatus

Labels: TypeAlias = dict[str, str]
Sample: TypeAlias = tuple[Labels, int | float]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its head lines, and where its samples come from."""

    name: str
    type: Literal["counter", "gauge"]
    help: str
    samples: Callable[[MountStatus], Iterator[Sample]]


def render(status: MountStatus) -> str:
    """The text.  A figure that the status lacks is left out, and so is a metric without any."""
    return "".join(line for family in FAMILIES for line in _lines(family, status))


def _lines(family: Family, status: MountStatus) -> Iterator[str]:
    samples = list(family.samples(status))
    if samples:
        yield f"# HELP {family.name} {_escaped_help(family.help)}\n"
        yield f"# TYPE {family.name} {family.type}\n"
    for labels, value in samples:
        pairs = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
        yield f"{family.name}{{{pairs}}} {value}\n" if pairs else f"{family.name} {value}\n"


def _escaped_help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _escaped(text: str) -> str:
    return _escaped_help(text).replace('"', r"\"")


def _unique(name: str) -> str:
    """A name in UTF-8, and never another name's: one series given twice spoils all of a scrape.

    A byte that is not UTF-8 is %XX, and what would look like that begins with %25.
    """
    if not name.isascii() or "%" in name:
        name = re.sub("%(?=[0-9A-Fa-f]{2})", "%25", name)
        return re.sub("[\ud800-\udfff]", _percent, name)
    return name


def _percent(match: re.Match[str]) -> str:
    # surrogatepass: half a pair is no file's name, but JSON can hold it.
    code = match[0].encode("utf-8", "surrogatepass")
    if 0xDC80 <= ord(match[0]) <= 0xDCFF:
        code = bytes([ord(match[0]) - 0xDC00])
    return "".join(f"%{byte:02X}" for byte in code)


def _of_images(key: str, **more: str) -> Callable[[MountStatus], Iterator[Sample]]:
    def samples(status: MountStatus) -> Iterator[Sample]:
        for name, image in status["images"].items():
            value = image.get(key)
            if isinstance(value, int | float):
                yield {"image": _unique(name), **more}, value

    return samples


def _of(
    part: Callable[[MountStatus], Mapping[str, object]], key: str
) -> Callable[..., Iterator[Sample]]:
    def samples(status: MountStatus) -> Iterator[Sample]:
        value = part(status).get(key)
        if isinstance(value, int | float):
            yield {}, value

    return samples


def _read_bytes(status: MountStatus) -> Iterator[Sample]:
    for origin in ("native", "python"):
        yield from _of_images(f"bytes_{origin}", origin=origin)(status)


def _states(status: MountStatus) -> Iterator[Sample]:
    # One series a state, as the same query must find an image in each: state="open" == 0.
    for name, image in status["images"].items():
        for state in STATES:
            labels = {"image": _unique(name), "state": state.replace(" ", "_")}
            yield labels, int(image["state"] == state)


def _image_info(status: MountStatus) -> Iterator[Sample]:
    for name, image in status["images"].items():
        labels = {"image": _unique(name), "source": _unique(image["source"])}
        yield {**labels, "identity": _unique(image.get("identity") or "")}, 1


def _mount_info(status: MountStatus) -> Iterator[Sample]:
    yield {"pid": str(status["pid"]), "source": _unique(status["source"])}, 1


def _cache(key: str) -> Callable[[MountStatus], Iterator[Sample]]:
    return _of(lambda status: status["cache"], key)


def _memory(key: str) -> Callable[[MountStatus], Iterator[Sample]]:
    return _of(lambda status: status.get("memory", {}), key)


def _fast_path(key: str) -> Callable[[MountStatus], Iterator[Sample]]:
    return _of(lambda status: status["fast_path"], key)


def _counter(name: str, text: str, samples: Callable[[MountStatus], Iterator[Sample]]) -> Family:
    return Family(f"imgfs_{name}_total", "counter", text, samples)


def _gauge(name: str, text: str, samples: Callable[[MountStatus], Iterator[Sample]]) -> Family:
    return Family(f"imgfs_{name}", "gauge", text, samples)


FAMILIES = (
    _gauge("mount_info", "The process that serves the mount, and what is mounted.", _mount_info),
    _gauge("image_info", "The image's source and its identity.", _image_info),
    _gauge("image_state", "1 for the state that the image is in.", _states),
    _gauge("image_size_bytes", "Size of the raw view.", _of_images("size")),
    _gauge("image_stored_bytes", "What of it is not holes.", _of_images("stored")),
    _counter("image_read_bytes", "Bytes given to programs, by who answered.", _read_bytes),
    _counter("image_fetched_bytes", "Bytes read from the source.", _of_images("bytes_fetched")),
    _counter("image_reads", "Reads answered.", _of_images("reads")),
    _counter("image_hits", "Reads whose bytes were all local.", _of_images("hits")),
    _counter("image_misses", "Reads that waited for the source.", _of_images("misses")),
    _gauge("image_reads_in_flight", "Reads that wait for Python.", _of_images("in_flight")),
    _gauge("image_fetches_in_flight", "Requests to the source.", _of_images("fetching")),
    _gauge("image_readahead_window_bytes", "How far readahead is ahead.", _of_images("window")),
    _counter("image_written_bytes", "Bytes written to the source.", _of_images("bytes_written")),
    _gauge("image_dirty_bytes", "Bytes written, not at the source yet.", _of_images("dirty")),
    _gauge("image_cached_bytes", "Bytes of the image in the cache.", _of_images("cached")),
    _counter("image_errors", "Reads that failed.", _of_images("errors")),
    _gauge("cache_limit_bytes", "Most that the cache may hold on disk.", _cache("limit")),
    _gauge("cache_used_bytes", "What the cache holds on disk.", _cache("used")),
    _gauge("memory_limit_bytes", "Most that may be on its way or wait.", _memory("limit")),
    _gauge("memory_used_bytes", "What is on its way or waits.", _memory("used")),
    _gauge("memory_peak_bytes", "The most that was so far.", _memory("peak")),
    _gauge("memory_waiting", "Fetches that wait for room.", _memory("waiting")),
    _counter("fast_path_reads", "Reads answered natively.", _fast_path("reads")),
    _counter("fast_path_read_bytes", "Bytes of those.", _fast_path("bytes")),
    _counter("fast_path_spliced", "Of the reads, large ones not copied.", _fast_path("spliced")),
    _counter("fast_path_seeks", "SEEK_DATA and SEEK_HOLE answered natively.", _fast_path("seeks")),
    _counter("fast_path_lookups", "Names looked up natively.", _fast_path("lookups")),
    _counter("fast_path_handed_over", "Requests handed to Python.", _fast_path("queued")),
    _counter(
        "fast_path_parked", "Reads that waited for blocks on their way.", _fast_path("parked")
    ),
    _counter("fast_path_interrupts", "Requests whose programs gave up.", _fast_path("interrupts")),
    _counter(
        "fast_path_disk_waits", "Reads that waited for the disk.", _fast_path("waited_for_disk")
    ),
    _counter("fast_path_writes", "Writes answered natively.", _fast_path("writes")),
    _counter("fast_path_written_bytes", "Bytes of those.", _fast_path("bytes_written")),
    _counter("fast_path_zeroes", "Holes punched and ranges zeroed.", _fast_path("zeroes")),
    _counter("fast_path_syncs", "Syncs answered natively.", _fast_path("syncs")),
    _counter(
        "fast_path_writes_spliced",
        "Of the writes, large ones not copied.",
        _fast_path("writes_spliced"),
    ),
    _counter("fast_path_spare_writes", "Writes by the spare threads.", _fast_path("handed_over")),
    _gauge("fast_path_queue_length", "Requests that wait for Python.", _fast_path("queue_length")),
)
