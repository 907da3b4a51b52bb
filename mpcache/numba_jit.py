"""Functions that Numba compiles at their first use, and keeps on disk where it can."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Any], Any]:
    """`njit` for one thread's work; each process compiles anew where no folder can be written."""

    def decorate(function: Any) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # a read-only installation, and no home either, as in containers
            return njit(nogil=True, **options)(function)

    return decorate
