"""imgfs: remote disk images as ordinary files."""

__version__ = "0.1.0"
