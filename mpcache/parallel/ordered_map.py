"""One task a part, done by threads of this process or by a Dask cluster; the results in order.

Results come in the order of their tasks whoever was faster, so that what is summed up of them does
not depend on who worked. A lost worker's tasks are done again by Dask: tasks are such that
doing them twice is harmless.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from mpcache.parallel.config import ParallelConfig

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 4  # tasks given out for each that is in work: nobody waits for the slowest one


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    parallel: ParallelConfig,
    *,
    quiet: bool,
) -> Iterator[Result]:
    """`function` of every task, in order; with a cluster, both must be picklable.

    Raises what a task raises; tasks that were begun are finished, no other begins.
    """
    with _staff(parallel, quiet) as (executor, concurrency):
        given: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                given.append(executor.submit(function, task))
                if len(given) == _AHEAD * concurrency:
                    yield given.popleft().result()
            while given:
                yield given.popleft().result()
        finally:
            for future in given:
                future.cancel()


@contextlib.contextmanager
def _staff(parallel: ParallelConfig, quiet: bool) -> Iterator[tuple[Executor, int]]:
    """Who does the tasks, and how many at a time."""
    if not parallel.is_wanted:
        # each thread computes alone: theirs is the parallelism. This one's own number is settled
        # first, or it would be theirs too, and a model would compute other bits with it
        torch.get_num_threads()
        with ThreadPoolExecutor(
            parallel.at_a_time, "part", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool, parallel.at_a_time
        return
    from distributed.scheduler import KilledWorker  # Dask's scheduler is not needed by threads

    from mpcache.parallel.dask_cluster import connected

    with connected(parallel, threads=parallel.at_a_time, preload=__name__, quiet=quiet) as client:
        concurrency = max(1, sum(client.nthreads().values()))
        try:
            yield client.get_executor(pure=False), concurrency
        except CancelledError:
            raise ConnectionError(
                "the Dask scheduler was lost; the same command goes on from there"
            ) from None
        except KilledWorker as error:
            times = error.allowed_failures + 1
            raise OSError(f"a part's workers died {times} times; out of memory?") from None
