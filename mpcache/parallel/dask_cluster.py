"""A Dask cluster to work with: one of this machine, or one that is there already."""

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

from mpcache.parallel.config import DaskConfig

# forked workers would start in no time, but hang where OpenMP has several threads, and cannot use
# CUDA; tests, which compute in one thread, set "forkserver"
START_METHOD = "spawn"
CONNECT = 30.0  # seconds


@contextlib.contextmanager
def connected(wanted: DaskConfig, *, threads: int, preload: str, quiet: bool) -> Iterator[Client]:
    """A client of the cluster, once it has a worker; `threads` and `preload` are for our own."""
    with contextlib.ExitStack() as exits:
        address: Any = wanted.scheduler
        if address is None:
            assert wanted.workers is not None
            address = exits.enter_context(local_cluster(wanted.workers, threads, preload))
        try:
            client = Client(address, timeout=CONNECT, set_as_default=False)
        except (OSError, TimeoutError) as error:
            raise ConnectionError(f"no Dask scheduler answers at {address}: {error}") from error
        exits.enter_context(client)
        hint = "" if find_spec("bokeh") else " (its pages need bokeh: pip install bokeh)"
        _say(f"dashboard: {client.dashboard_link}{hint}", quiet)
        if not client.scheduler_info(n_workers=-1)["workers"]:
            _say(f"waiting for workers of {wanted.scheduler}", quiet)
            client.wait_for_workers(1)
        yield client


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        sys.stderr.write(line + "\n")


@contextlib.contextmanager
def local_cluster(workers: int, threads: int, preload: str) -> Iterator[LocalCluster]:
    """Processes of this machine that have imported a module, each with so many tasks at a time."""
    settings = {
        "distributed.worker.multiprocessing-method": START_METHOD,
        "distributed.comm.timeouts.connect": CONNECT,
    }
    with dask.config.set(settings), _interrupts_ignored(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Port .* is already in use")
        get_mp_context()  # sets its own preload, once
        if START_METHOD == "forkserver":
            multiprocessing.get_context(START_METHOD).set_forkserver_preload([preload])
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:8787",
            memory_limit=0,  # Dask would pause workers for what the model takes
            silence_logs=logging.CRITICAL,
            preload=[__name__, preload],
        )
    with dask.config.set(settings), cluster:
        yield cluster


def dask_setup(worker: Any) -> None:
    """Called by Dask in workers of this machine, which share the command's terminal.

    Ctrl-C is for the command, which then stops them.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start meanwhile ignore Ctrl-C: it is for the command, which then stops them.

    A terminal sends it to all of them, and they would end in the middle of a part.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
