"""Builds the native modules; everything else is in pyproject.toml."""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("imgfs/_native")
COMMON = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"]


def pkg_config(option: str) -> list[str]:
    out = subprocess.run(
        ["pkg-config", option, "fuse3"], check=True, capture_output=True, text=True
    )
    return shlex.split(out.stdout)


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
    ext_modules=[
        native("_map", "store/*.c", "map/*.c", "objects/*.c", libs=["-lpthread"]),
        native("_tables", "formats/tables.c"),
        native("_pieces", "formats/pieces.c", "store/scan.c"),
        native("_heap", "heap.c"),
        native(
            "_fuse",
            "fuse/*.c",
            cflags=pkg_config("--cflags"),
            libs=[*pkg_config("--libs"), "-lpthread", "-ldl"],
        ),
    ]
)
