"""Loading the native parts in the one way that works.

Their C is in folders, each of which may include what stands before it:

    store/    block stores: a file, and which of its blocks are there
    map/      the segment map over stores, writing through it, and the log of what was written
    objects/  both as Python's objects: the module `_map`
    formats/  tables into extents, extents into pieces: `_tables` and `_pieces`
    fuse/     the interposer and the request threads: `_fuse`
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

# A free-threaded Python turns its lock on when it loads these modules, which do not say that they
# can do without; but not against the user's word.
if getattr(sys.flags, "gil", None) == 0:
    raise ImportError("imgfs needs Python's global lock: run it without PYTHON_GIL=0 and -X gil=0")


def load_fuse() -> ModuleType:
    """The interposer, loaded so that pyfuse3's extension binds to its functions.

    Raises ImportError when pyfuse3 came first: then everything would work, with the
    fast path silently dead.
    """
    loaded = sys.modules.get("imgfs._native._fuse")
    if loaded is not None:
        return loaded
    if "pyfuse3" in sys.modules:
        raise ImportError("pyfuse3 was imported before imgfs._native._fuse")
    # Only this one object is to be visible to what is loaded later.
    from imgfs._native import _map  # noqa: F401

    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        from imgfs._native import _fuse
    finally:
        sys.setdlopenflags(flags)
    return _fuse
