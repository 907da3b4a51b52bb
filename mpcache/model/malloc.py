"""Memory that a forward pass frees and asks for again stays with the process.

By default the C library of Linux gives large blocks back to the system at once, and gets the same
ones again, page by page, in the next layer: on a virtual machine a third of a pass on CPUs.
"""

import ctypes
import sys

# of GNU's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> None:
    """From now on, as far as the C library is one that can: no other is told anything."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_MAX, 0)  # all blocks from the heap, which keeps them
