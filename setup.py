"""Builds the native modules; everything else is in pyproject.toml."""

import shlex
import subprocess

from setuptools import Extension, setup

COMMON = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"]
HEADERS = [
    f"imgfs/_native/{name}.h"
    for name in (
        *("api", "entry", "fast", "log", "objects", "pieces"),
        *("scan", "segmap", "segmap_walk", "store"),
    )
]


def pkg_config(option: str) -> list[str]:
    out = subprocess.run(
        ["pkg-config", option, "fuse3"], check=True, capture_output=True, text=True
    )
    return shlex.split(out.stdout)


def native(name: str, sources: list[str], cflags: list[str], libs: list[str]) -> Extension:
    return Extension(
        f"imgfs._native.{name}",
        [f"imgfs/_native/{source}.c" for source in sources],
        depends=HEADERS,
        extra_compile_args=COMMON + cflags,
        extra_link_args=libs,
    )


setup(
    ext_modules=[
        native(
            "_map",
            [
                *("holdobject", "mapmodule", "mapput", "mapset", "mapwrite"),
                *("log", "logobject", "scan"),
                *("store", "storeheld", "storeobject", "storewatch"),
                *("segmap", "segchunks", "segcopy", "segfill", "segmove", "segread"),
                *("segstores", "segwrite"),
            ],
            [],
            ["-lpthread"],
        ),
        native("_tables", ["tables"], [], []),
        native("_pieces", ["pieces", "scan"], [], []),
        native(
            "_fuse",
            ["fusemodule", "inodes", "interpose", "queue", "requests", "splices", "writes"],
            pkg_config("--cflags"),
            [*pkg_config("--libs"), "-lpthread", "-ldl"],
        ),
    ]
)
