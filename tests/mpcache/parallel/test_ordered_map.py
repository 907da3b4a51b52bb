"""Threads and clusters give the same results in the same order; failures reach the caller."""

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed.client import Client

from mpcache.errors import DamagedStoreError
from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.dask_cluster import start_cluster
from mpcache.parallel.ordered_map import ordered_map
from tests.helpers.commands import fast_starting_workers

# Dask's threads warn of connections that a kill has cut
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with (
        fast_starting_workers(),
        start_cluster(2, 1, "mpcache.parallel.ordered_map") as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(params=["one thread", "threads", "cluster"])
def parallel(request: pytest.FixtureRequest, cluster: Client) -> ParallelConfig:
    if request.param == "cluster":
        return ParallelConfig(scheduler=cluster.scheduler.address)
    return ParallelConfig(threads=1 if request.param == "one thread" else 3)


def square_slowly_if_even(number: int) -> int:
    time.sleep(0.02 * (number % 2 == 0))
    return number * number


def fail_at_three(folder: Path, number: int) -> int:
    (folder / str(number)).touch()
    if number == 3:
        raise DamagedStoreError("three is damaged")
    return number


def kill_first_worker(folder: Path, number: int) -> int:
    """The process of the first task kills itself, the first time."""
    if number == 0 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_in_the_order_of_the_tasks(parallel: ParallelConfig) -> None:
    results = list(ordered_map(square_slowly_if_even, range(20), parallel, quiet=True))
    assert results == [number * number for number in range(20)]


def test_a_failure_is_raised_and_few_tasks_begin_after_it(
    parallel: ParallelConfig, tmp_path: Path
) -> None:
    with pytest.raises(DamagedStoreError, match="three is damaged"):
        list(
            ordered_map(
                functools.partial(fail_at_three, tmp_path), range(500), parallel, quiet=True
            )
        )
    assert len(list(tmp_path.iterdir())) < 60


def test_at_most_as_many_tasks_as_threads_run_at_once() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def count(_: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= 1

    list(ordered_map(count, range(40), ParallelConfig(threads=3), quiet=True))
    assert most == 3


def test_tasks_are_submitted_as_results_are_taken() -> None:
    """A store may have a million parts: neither all tasks nor all results wait in memory."""
    submitted: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            submitted.append(number)
            yield number

    results = ordered_map(lambda number: number, tasks(), ParallelConfig(threads=2), quiet=True)
    next(results)
    assert len(submitted) <= 10
    results.close()  # type: ignore[attr-defined]  # a generator


def test_tasks_of_a_lost_worker_run_again(tmp_path: Path, cluster: Client) -> None:
    parallel = ParallelConfig(scheduler=cluster.scheduler.address)
    results = list(
        ordered_map(functools.partial(kill_first_worker, tmp_path), range(12), parallel, quiet=True)
    )
    assert (tmp_path / "killed").exists()
    assert results == list(range(12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 2, "scheduler": "tcp://h:1"}, "start the Dask workers with --nthreads"),
    ],
)
def test_invalid_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)  # type: ignore[arg-type]
