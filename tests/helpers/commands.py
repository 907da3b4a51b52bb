"""Collections in separate processes, and checks of their stores."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import dask
import psutil

from mpcache.collection.collect import collect
from mpcache.config import CollectConfig
from mpcache.maintenance.verify import verify
from mpcache.parallel.config import CollectParallelConfig
from mpcache.parallel.dask_cluster import START_METHOD_KEY
from tests.helpers.stores import files_of, marks_of


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a command in a separate process, which may have children."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["mpcache.collection.dask_client", "mpcache.collection.dask_worker"]
    )
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def equal(path: Path, uninterrupted: Path) -> bool:
    """Whether all digests and all bytes are equal, leftovers of interrupted writes aside."""
    finished = {n: data for n, data in files_of(path).items() if not n.endswith(".partial")}
    return marks_of(path) == marks_of(uninterrupted) and finished == files_of(uninterrupted)


def clean(path: Path) -> bool:
    return {finding.fault for finding in verify(path).findings} <= {"leftover"}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def fast_starting_workers() -> dask.config.set:
    """Workers are forked from a server that has imported what they need."""
    return dask.config.set({START_METHOD_KEY: "forkserver"})


def collect_with_four(config: CollectConfig, path: str | Path) -> None:
    # a child may use the server that forked it, its documentation says, but starts one of its own:
    # that would import everything again for each of these commands
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running
    with fast_starting_workers():
        collect(config, path, CollectParallelConfig(workers=4))


def workers_of(command: BaseProcess) -> list[int]:
    """Process ids of the workers: the server forked them after the command."""
    parent = psutil.Process(command.pid)
    pids: list[int] = []
    while not pids:
        others = (p for p in parent.parent().children() if p.pid != parent.pid)
        pids = [p.pid for p in others if p.create_time() > parent.create_time()]
    return pids
