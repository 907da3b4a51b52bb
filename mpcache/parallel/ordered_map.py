"""A parallel map over parts, by threads of this process or by a Dask cluster.

Results come in the order of their tasks, whichever task ended first, so that sums over results do
not depend on the workers. Dask runs the tasks of a lost worker again: a task must be harmless when
it runs twice.
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
_QUEUED = 4  # submitted tasks for each one that runs, so that one slow task makes no worker idle


def ordered_map(
    fn: Callable[[Task], Result],
    tasks: Iterable[Task],
    parallel: ParallelConfig,
    *,
    quiet: bool,
) -> Iterator[Result]:
    """`fn(task)` for every task, in the order of the tasks.

    With a cluster, the function and the tasks must be picklable. An exception of a task is raised
    here: tasks that run are finished, and no other task begins.
    """
    with _executor(parallel, quiet) as (executor, concurrency):
        futures: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                futures.append(executor.submit(fn, task))
                if len(futures) == _QUEUED * concurrency:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()


@contextlib.contextmanager
def _executor(parallel: ParallelConfig, quiet: bool) -> Iterator[tuple[Executor, int]]:
    """An executor, and how many tasks it runs at the same time."""
    if not parallel.uses_dask:
        # Each thread computes with one core: the threads are the parallelism. torch must settle
        # this thread's own number first. Else it would also be 1, and a model would compute other
        # bits with it.
        torch.get_num_threads()
        threads = parallel.threads_per_process
        with ThreadPoolExecutor(
            threads, "part", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool, threads
        return
    from distributed.scheduler import KilledWorker  # slow to import, and only Dask raises it

    from mpcache.parallel.dask_cluster import connect

    threads = parallel.threads_per_process
    with connect(parallel, threads=threads, preload=__name__, quiet=quiet) as client:
        concurrency = max(1, sum(client.nthreads().values()))
        try:
            yield client.get_executor(pure=False), concurrency
        except CancelledError:
            raise ConnectionError(
                "the Dask scheduler was lost; run the same command again to continue"
            ) from None
        except KilledWorker as error:
            times = error.allowed_failures + 1
            raise OSError(
                f"{times} workers died on the same part, perhaps because the memory was full; "
                "use fewer --threads or --workers"
            ) from None
