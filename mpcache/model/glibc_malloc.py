"""Keeps memory that a forward pass frees in the process.

By default glibc returns large blocks to the system at once and gets them back page by page in the
next layer. On a virtual machine this takes a third of the time of a pass on CPUs.
"""

import ctypes
import sys

# constants of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the system. No-op with other C libraries."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no mallopt
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_MAX, 0)  # take all blocks from the heap, which keeps them
