"""A Dask cluster: one that is started on this machine, or one that runs already."""

import contextlib
import logging
import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import dask
from distributed.client import Client
from distributed.deploy.local import LocalCluster
from distributed.utils import get_mp_context

from mpcache.parallel.config import WorkersConfig

# Dask's own setting, by default "spawn": forked workers would start at once, but they hang where
# OpenMP has several threads, and they cannot use CUDA. Tests compute in one thread and set
# "forkserver", which starts workers faster.
START_METHOD_KEY = "distributed.worker.multiprocessing-method"
CONNECT_TIMEOUT_KEY = "distributed.comm.timeouts.connect"


@contextlib.contextmanager
def connect(
    parallel: WorkersConfig, *, threads: int, preload: str, quiet: bool
) -> Iterator[Client]:
    """A client of the cluster, once the cluster has a worker.

    Workers that are started here run `threads` tasks at a time and have imported the module
    `preload`.

    Raises:
        ConnectionError: no scheduler answers at the address.
    """
    with contextlib.ExitStack() as exits:
        address: Any = parallel.scheduler
        if address is None:
            assert parallel.workers is not None
            address = exits.enter_context(start_cluster(parallel.workers, threads, preload))
        try:
            client = Client(address, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise ConnectionError(
                f"no Dask scheduler answers at {address}: {error}; check that it runs, and that "
                "this machine can reach it"
            ) from error
        exits.enter_context(client)
        hint = "" if find_spec("bokeh") else " (its pages need bokeh: pip install bokeh)"
        _print(f"dashboard: {client.dashboard_link}{hint}", quiet)
        if not client.scheduler_info(n_workers=-1)["workers"]:
            _print(f"waiting for workers of {parallel.scheduler}", quiet)
            client.wait_for_workers(1)
        yield client


def _print(line: str, quiet: bool) -> None:
    if not quiet:
        sys.stderr.write(line + "\n")


@contextlib.contextmanager
def start_cluster(workers: int, threads: int, preload: str) -> Iterator[LocalCluster]:
    """Worker processes on this machine that have imported a module, each with `threads` tasks."""
    with _interrupts_ignored(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        get_mp_context()  # it sets a preload of its own, once
        if dask.config.get(START_METHOD_KEY) == "forkserver":
            multiprocessing.get_context("forkserver").set_forkserver_preload([preload])
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:8787",
            memory_limit=0,  # Dask would pause workers because of the model's memory
            silence_logs=logging.CRITICAL,
            preload=[__name__, preload],
        )
    with cluster:
        yield cluster


def dask_setup(worker: Any) -> None:
    """Called by Dask in the workers of this machine, which share the command's terminal.

    Workers ignore Ctrl-C: the command receives it too, and stops its workers.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start in this context ignore Ctrl-C.

    A terminal sends Ctrl-C to all of its processes, and workers would end in the middle of a part.
    The command stops its workers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
