"""Jobs in threads, also when no more threads can be started."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import re, resource, sys, threading, time
from pathlib import Path
import trio
from imgfs import threads

def forbid():
    used = int(re.search(r"VmSize:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    # Some memory is left, or anything may fail; and less than a thread's stack takes.
    most = used + threads.STACK * 3 // 4
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    threading.stack_size(threads.STACK)
    try:
        threading.Thread(target=print).start()
    except (RuntimeError, MemoryError):
        return
    sys.exit("a thread could be started")

async def main():
    threads.take_over()
    before = threading.active_count()
    forbid()
    done = []
    def job(number):
        time.sleep(0.002)
        done.append(number)
        return number
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(trio.to_thread.run_sync, job, number)
    assert sorted(done) == list(range(100))
    try:
        await trio.to_thread.run_sync(int, "x")
    except ValueError:
        pass
    assert threading.active_count() == before
    print("done")

trio.run(main)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_no_more_can_be_started() -> None:
    done = python(CODE)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_none_can_be_started() -> None:
    code = CODE.replace("    threads.take_over()\n    before", "    before")
    code = code.replace("    forbid()\n    done", "    forbid()\n    threads.take_over()\n    done")
    done = python(code)
    assert done.returncode == 1
    assert "NoThread: no thread can be started; raise the limit" in done.stderr


def test_they_end_when_they_are_not_needed() -> None:
    code = """
import threading, time, trio
from imgfs import threads
threads.IDLE_S = 0.05

async def main():
    threads.take_over()
    before = threading.active_count()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(trio.to_thread.run_sync, time.sleep, 0.1)
    while threading.active_count() > before:
        await trio.sleep(0.01)
    assert await trio.to_thread.run_sync(str, 5) == "5"

trio.run(main)
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")
