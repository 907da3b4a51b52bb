"""Compiles functions with Numba at their first use, and caches the result on disk if possible."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Any], Any]:
    """`njit` without the GIL. Without a writable cache folder, each process compiles again."""

    def decorate(function: Any) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no writable folder, as in some containers
            return njit(nogil=True, **options)(function)

    return decorate
