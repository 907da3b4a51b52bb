"""Work on rows in plain threads, for functions that let go of Python's lock."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch


def in_pieces(work: Callable[[int, int], None], rows: int, most: int) -> None:
    """Call `work(first, end)` on pieces of `range(rows)` with at most `most` rows.

    As many at once as torch has threads; which thread does which piece must not matter. Raises what
    the first of the pieces that fail raises, once none is at work any more.
    """
    pieces = [(first, min(first + most, rows)) for first in range(0, rows, most)]
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) == 1:
        for first, end in pieces:
            work(first, end)
        return
    done = [_pool(threads).submit(work, *piece) for piece in pieces]
    wait(done)
    for piece in done:
        piece.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rows")
