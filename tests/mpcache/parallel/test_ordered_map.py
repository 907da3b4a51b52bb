"""Whoever does the tasks: the same results in the same order, and failures reach the command."""

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
from mpcache.parallel import dask_cluster as cluster_stage
from mpcache.parallel import ordered_map as hands_stage
from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map

# Dask's own threads complain of connections that a kill has cut
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_stage, "START_METHOD", "forkserver")
        with (
            cluster_stage.local_cluster(2, 1, "mpcache.parallel.ordered_map") as local,
            Client(local, set_as_default=False) as client,
        ):
            yield client


@pytest.fixture(params=["one thread", "threads", "cluster"])
def parallel(request: pytest.FixtureRequest, cluster: Client) -> ParallelConfig:
    if request.param == "cluster":
        return ParallelConfig(scheduler=cluster.scheduler.address)
    return ParallelConfig(threads=1 if request.param == "one thread" else 3)


def late_if_even(number: int) -> int:
    time.sleep(0.02 * (number % 2 == 0))
    return number * number


def noted(folder: Path, number: int) -> int:
    (folder / str(number)).touch()
    if number == 3:
        raise DamagedStoreError("three is damaged")
    return number


def deadly(folder: Path, number: int) -> int:
    """Kills the process that does the first task, the first time."""
    if number == 0 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_in_the_order_of_the_tasks(parallel: ParallelConfig) -> None:
    found = list(ordered_map(late_if_even, range(20), parallel, quiet=True))
    assert found == [number * number for number in range(20)]


def test_a_failure_is_raised_and_few_tasks_begin_after_it(
    parallel: ParallelConfig, tmp_path: Path
) -> None:
    with pytest.raises(DamagedStoreError, match="three is damaged"):
        list(ordered_map(functools.partial(noted, tmp_path), range(500), parallel, quiet=True))
    assert len(list(tmp_path.iterdir())) < 60


def test_no_more_tasks_than_threads_are_in_work() -> None:
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


def test_tasks_are_given_out_as_results_are_taken() -> None:
    """A store may have a million parts: neither tasks nor results of all wait in memory."""
    given: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            given.append(number)
            yield number

    found = ordered_map(lambda number: number, tasks(), ParallelConfig(threads=2), quiet=True)
    next(found)
    assert len(given) <= 2 * hands_stage._AHEAD
    found.close()  # type: ignore[attr-defined]  # a generator


def test_a_lost_workers_tasks_are_done_again(tmp_path: Path, cluster: Client) -> None:
    parallel = ParallelConfig(scheduler=cluster.scheduler.address)
    found = list(ordered_map(functools.partial(deadly, tmp_path), range(12), parallel, quiet=True))
    assert (tmp_path / "killed").exists()
    assert found == list(range(12))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 2, "scheduler": "tcp://h:1"}, "start its workers with --nthreads"),
    ],
)
def test_hands_that_cannot_be(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ParallelConfig(**settings)  # type: ignore[arg-type]
