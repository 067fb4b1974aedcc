"""Who may import whom, how long a file may be, and what a local mount must not pay for."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import Mount

CHECKOUT = Path(__file__).parents[1]
LONGEST = 500

# Each may import itself and what stands behind it.
LAYERS = ["fuse", "tree", "views", "overlays", "cache", "sources"]
# These may import nothing of the layers.
PURE = ["formats", "guest", "extents", "errors", "units", "url", "image", "mapjson"]
PURE += ["_native", "budget", "checksums", "daemon", "limits", "locks", "pieces", "status"]
PURE += ["steps", "threads"]
WIRING = ["app", "opener", "cli", "copying", "library", "plain", "__init__"]
# What a person may ask of any layer: it knows their settings, and no wiring.
ASKED = ["config"]


def modules() -> Iterator[Path]:
    return (CHECKOUT / "imgfs").rglob("*.py")


def part_of(path: Path) -> str:
    """`fuse` of imgfs/fuse/session.py, `errors` of imgfs/errors.py."""
    return path.relative_to(CHECKOUT / "imgfs").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of imgfs that the file imports anywhere, also inside of functions."""
    found: set[str] = set()
    gc.disable()  # Python 3.11 loses count of its depth when it collects while it parses
    try:
        tree = ast.parse(path.read_text())
    finally:
        gc.enable()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("imgfs.")}
    return found


def forbidden(part: str) -> set[str]:
    if part in WIRING:
        return set()
    if part in LAYERS:
        return {*LAYERS[: LAYERS.index(part)], *WIRING}
    if part in PURE:
        return {*LAYERS, *WIRING, *ASKED}
    assert part in ASKED, f"{part}: say in this file what it may import"
    return {*WIRING}


@pytest.mark.parametrize("path", sorted(modules()), ids=lambda p: str(p.relative_to(CHECKOUT)))
def test_imports_point_one_way(path: Path) -> None:
    assert not imported(path) & forbidden(part_of(path))


def test_rules_are_about_what_is_there() -> None:
    parts = {part_of(path) for path in modules()}
    assert parts == {*LAYERS, *PURE, *WIRING, *ASKED}
    assert {"errors", "sources"} <= imported(CHECKOUT / "imgfs/opener/sources.py")
    assert "fuse" in imported(CHECKOUT / "imgfs/app.py")  # inside of a function


def test_sans_io_parts_do_no_io() -> None:
    io = {"os", "io", "pathlib", "socket", "subprocess", "trio", "asyncio", "mmap", "shutil"}
    for part in ("formats", "guest"):
        for path in (CHECKOUT / "imgfs" / part).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    assert not {a.name.split(".")[0] for a in node.names} & io, path
                elif isinstance(node, ast.ImportFrom):
                    assert (node.module or "").split(".")[0] not in io, path


#: How often an object is referred to, when it is collected, and whether a lock of Python's is held
#: tells nothing about whether anybody uses it: Python 3.14 counts otherwise than 3.11 did.
FORBIDDEN = {"getrefcount", "getrefs", "__del__", "_is_gil_enabled", "setswitchinterval"}
FORBIDDEN |= {"finalize", "WeakSet", "WeakKeyDictionary", "WeakValueDictionary"}
FORBIDDEN_MODULES = {"gc"}
#: They only do not keep alive what they refer to; what can be reached is there.
WEAK = {"imgfs/views/overlay.py", "imgfs/views/view.py"}
FORBIDDEN_IN_C = ["Py_REFCNT", "Py_SET_REFCNT", "ob_refcnt", "IsUniquelyReferenced", "tp_finalize"]
FORBIDDEN_IN_C += ["PyGC_", "PyObject_GC_", "PyGILState_Check", "Py_MOD_GIL_NOT_USED"]


def names_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # getattr's


def test_nothing_decides_by_reference_counts_or_the_collector() -> None:
    for path in [*modules(), *(CHECKOUT / "contrib").rglob("*.py")]:
        names = set(names_in(ast.parse(path.read_text())))
        assert not names & FORBIDDEN, path
        where = str(path.relative_to(CHECKOUT))
        assert not names & FORBIDDEN_MODULES, path
        assert "weakref" not in names or where in WEAK, path
    for where in WEAK:
        assert "weakref" in (CHECKOUT / where).read_text()
    for path in (CHECKOUT / "imgfs/_native").rglob("*.[ch]"):
        text = path.read_text()
        assert not [each for each in FORBIDDEN_IN_C if each in text], path


def test_no_file_is_long() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.pyi", "*.c", "*.h", "*.sh"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    files = tracked or [str(path) for path in modules()]
    lengths = {name: (CHECKOUT / name).read_bytes().count(b"\n") for name in files}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


HEAVY = "('asyncssh', 'obstore', 'uvloop', 'cryptography', 'asyncio', 'pyfuse3', 'msgspec', 'rich')"


def test_the_command_line_imports_little() -> None:
    code = f"import sys, imgfs.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]\n"


def test_a_local_mount_does_not_load_ssh_or_http(
    mount: Callable[..., Mount],
    sparse: Path,
) -> None:
    m = mount(sparse)
    (m.point / "disk.raw").read_bytes()
    mapped = Path(f"/proc/{m.pid}/maps").read_text()
    assert "pyfuse3" in mapped  # or else this would see nothing
    assert "uvloop" not in mapped
    assert "_rust" not in mapped  # asyncssh's cryptography
    assert "_obstore" not in mapped
    assert "msgspec" not in mapped


def test_help() -> None:
    command = [sys.executable, "-m", "imgfs.cli.main"]
    for words in (["--help"], ["-h"], ["mount", "--help"], ["map", "--help"], ["top", "--help"]):
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage:" in done.stdout
    listed = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=30)
    for name in ("copy", "mount", "umount", "info", "map", "snapshot", "top"):
        assert f"\n  {name} " in listed.stdout
