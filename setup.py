"""Builds the native modules; everything else is in pyproject.toml."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

NATIVE = Path("imgfs/_native")
COMMON = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"]


def pkg_config(option: str) -> list[str]:
    """What libfuse 3 needs.  Ends with a line that says what is missing."""
    try:
        out = subprocess.run(["pkg-config", option, "fuse3"], capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("imgfs needs pkg-config (Debian, Fedora: pkg-config)") from None
    if out.returncode:
        raise SystemExit(
            "imgfs needs the headers of libfuse 3.14 or later (Debian: libfuse3-dev, Fedora: "
            "fuse3-devel)"
        )
    return shlex.split(out.stdout)


UNITS = Path("contrib/systemd")


class WithUnits(build_py):
    """A package that is installed has the systemd units in it, for `imgfs install-files`."""

    def get_source_files(self) -> list[str]:
        """Of an sdist, from which a wheel is made."""
        units = [str(path) for path in UNITS.rglob("*") if path.is_file()]
        return [*super().get_source_files(), *units]

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "imgfs/share/systemd"
            shutil.copytree(UNITS, target, dirs_exist_ok=True)


def native(
    name: str, *sources: str, cflags: Sequence[str] = (), libs: Sequence[str] = ()
) -> Extension:
    found = [path for source in sources for path in sorted(NATIVE.glob(source))]
    return Extension(
        f"imgfs._native.{name}",
        [str(path) for path in found],
        depends=[str(path) for path in NATIVE.glob("*/*.h")],
        include_dirs=[str(path) for path in NATIVE.iterdir() if path.is_dir()],
        extra_compile_args=[*COMMON, *cflags],
        extra_link_args=list(libs),
    )


setup(
    cmdclass={"build_py": WithUnits},
    ext_modules=[
        native("_map", "store/*.c", "map/*.c", "objects/*.c", libs=["-lpthread"]),
        native("_tables", "formats/tables.c", "formats/overlap.c"),
        native("_pieces", "formats/pieces.c", "store/scan.c"),
        native("_heap", "heap.c"),
        native(
            "_fuse",
            "fuse/*.c",
            cflags=pkg_config("--cflags"),
            libs=[*pkg_config("--libs"), "-lpthread", "-ldl"],
        ),
    ],
)
