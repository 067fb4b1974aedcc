"""Runs a command in which some system calls fail, as container runtimes and systemd have it.

    python sandbox.py ERRNO NAME,NAME… COMMAND…

A NAME is a system call's, or `setpipe`: fcntl(2) with F_SETPIPE_SZ.  ERRNO is a name too.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import sys

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
NO_NEW_PRIVS = 3  # SCMP_FLTATR_CTL_NNP
EQ = 4  # SCMP_CMP_EQ
F_SETPIPE_SZ = 1031


class Compare(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def library() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("seccomp")
    return None if name is None else ctypes.CDLL(name)


def refuse(number: int, names: list[str]) -> None:
    lib = library()
    assert lib is not None
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(ALLOW)))
    assert context
    # fusermount3 needs its privileges, where this process may keep them.
    lib.seccomp_attr_set(context, NO_NEW_PRIVS, ctypes.c_uint32(os.geteuid() != 0))
    action = ctypes.c_uint32(ERRNO | number)
    for name in names:
        compare = (Compare * 1)(Compare(1, EQ, F_SETPIPE_SZ, 0))
        is_setpipe = name == "setpipe"
        call = lib.seccomp_syscall_resolve_name(b"fcntl" if is_setpipe else name.encode())
        assert call >= 0, name
        added = lib.seccomp_rule_add_array(context, action, call, int(is_setpipe), compare)
        assert added == 0, (name, added)
    loaded = lib.seccomp_load(context)
    assert loaded == 0, os.strerror(-loaded)


def main() -> None:
    refuse(getattr(errno, sys.argv[1]), sys.argv[2].split(","))
    os.execvp(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()
