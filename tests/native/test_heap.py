"""What the C library keeps of the memory that it was given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from imgfs._native import _heap

ARENAS = """
import ctypes, re, sys, threading
from imgfs._native import _heap

if int(sys.argv[1]):
    assert _heap.limit_arenas(int(sys.argv[1]))
libc = ctypes.CDLL(None)
held, here = [], threading.Barrier(9)

def work():
    here.wait()
    held.append([bytes(60_000) for _ in range(20)])
    here.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
for each in threads:
    each.start()
here.wait()
here.wait()
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""
TRIM = """
from pathlib import Path
from imgfs._native import _heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) << 12

before = resident()
pieces = [bytearray(50_000) for _ in range(2000)]
last = bytearray(50_000)
most = resident() - before
del pieces
_heap.trim()
print(most >> 20, resident() - before >> 20)
"""


KEEP = """
import resource, sys
from imgfs._native import _heap

if int(sys.argv[1]):
    assert _heap.keep_large()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [_heap.uninitialized(2 << 20) for _ in range(8)]
    for each in pieces:
        each[:: 4096] = bytes(512)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(min(faults() for _ in range(5)))
"""


@pytest.mark.parametrize("length", [0, 1, 4096, (2 << 20) + 1])
def test_uninitialized_memory_is_as_long_as_asked_and_nobody_elses(length: int) -> None:
    first, second = _heap.uninitialized(length), _heap.uninitialized(length)
    assert type(first) is bytearray
    first[:] = b"a" * length
    second[:] = b"b" * length
    assert (first.count(b"a"), second.count(b"b")) == (length, length)


@pytest.mark.parametrize("length", [-1, 1 << 62, "1"])
def test_no_memory_of_such_a_length(length: object) -> None:
    with pytest.raises((ValueError, MemoryError, SystemError, TypeError)):
        _heap.uninitialized(length)  # type: ignore[arg-type]


@pytest.mark.parametrize(("keeps", "least", "most"), [(0, 1000, 10000), (1, 0, 100)])
def test_large_pieces_are_kept(keeps: int, least: int, most: int) -> None:
    """Their pages are not mapped and cleared anew each time."""
    done = subprocess.run(
        [sys.executable, "-c", KEEP, str(keeps)], check=True, capture_output=True, text=True
    )
    assert least <= int(done.stdout) <= most


@pytest.mark.parametrize(("limit", "least", "most"), [(0, 5, 100), (2, 2, 2)])
def test_threads_share_arenas(limit: int, least: int, most: int) -> None:
    """Without the limit each has its own, up to eight a processor."""
    done = subprocess.run(
        [sys.executable, "-c", ARENAS, str(limit)], check=True, capture_output=True, text=True
    )
    assert least <= done.stdout.count("<heap nr=") <= most, done.stdout


def test_free_pages_are_given_back() -> None:
    """Also those that lie below what is in use."""
    done = subprocess.run([sys.executable, "-c", TRIM], check=True, capture_output=True, text=True)
    most, left = map(int, done.stdout.split())
    assert most > 90
    assert left < 5
