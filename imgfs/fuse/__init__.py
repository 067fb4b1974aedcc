"""The FUSE side.  Importing any of it loads the interposer first, as pyfuse3 needs it."""

from imgfs._native import load_fuse

load_fuse()
