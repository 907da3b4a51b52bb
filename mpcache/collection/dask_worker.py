"""What runs in the worker processes of a Dask cluster: a model that stays, and one part a task.

Tasks give back what happened instead of raising it, so that no exception has to cross machines.
"""

import contextlib
import errno
import functools
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from distributed.worker import get_worker
from transformers.utils.logging import disable_progress_bar

from mpcache.collection.jobs import Job
from mpcache.collection.producer import (
    ActivationProducer,
    Loaded,
    ModelFacts,
    commit_side,
    load,
    results,
    write_threads,
    yield_to_others,
)
from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.model.capture import part_input
from mpcache.model.file_snapshot import ModelFiles
from mpcache.model.model_source import find_source
from mpcache.storage.base import open_storage
from mpcache.store.description import is_store, read_store_file
from mpcache.store.format import acts_array, mark_path
from mpcache.store.reader import open_store
from mpcache.store.writer import Writer

_TELL_EVERY = 0.5  # seconds between two reports of progress
# what decides how a model is loaded; the rest of a config only decides how it is used
_OF_THE_MODEL = (
    "model", "revision", "model_dtype", "autocast", "attention", "trust_remote_code", "device",
    "ctx_len",
)  # fmt: skip

# a full disk or a place that cannot be written is so for every part: no reason to try the next one
_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}

Kind = Literal["mistake", "place", "fault", "stopped"]


@dataclass(frozen=True, kw_only=True)
class CollectionSpec:
    """What all tasks of one collection have in common."""

    run: str
    "tells collections apart that use the same workers"
    config: CollectConfig
    place: str
    fingerprint: str = ""
    threads: int | None = None
    "of the model in each process; None leaves what the environment says"
    devices: tuple[str, ...] = ()
    "by the worker's number; empty: each finds its own"


@dataclass(frozen=True)
class Done:
    """A part is committed."""

    bytes: int


@dataclass(frozen=True)
class Failure:
    """A task that did not work: what happened, and where."""

    kind: Kind
    told: str
    host: str
    worker: str
    "address of the worker"
    is_setup: bool
    "the worker cannot serve this collection at all; another one may"
    errno: int | None = None
    filename: str | None = None


class _Stopped(Exception):
    """The collection was interrupted."""


class _Setup(Exception):
    """This worker cannot serve a collection; the cause says why."""


def facts(orders: CollectionSpec) -> ModelFacts | Failure:
    """Load the model, and tell the store's half of the collection about it."""
    try:
        with _set_up(), WORKER.model:
            WORKER.forget_old_files(orders.config)
            facts = WORKER.station(orders).facts
            files = None if is_store(open_storage(orders.place)) else WORKER.files_digest()
            return replace(facts, model_files=files)
    except Exception as error:
        return _failure(error)


def collect_part(orders: CollectionSpec, job: Job) -> Done | Failure:
    """Read one part and commit what it lacks by now."""
    try:
        # a cluster may run more tasks in a process than fit its memory: one reads, one writes
        with WORKER.places:
            return _collect_part(orders, job)
    except Exception as error:
        return _failure(error)


def stop(run: str) -> None:
    """End the tasks of a collection soon: what was read is committed, nothing more is read."""
    WORKER.stopped.add(run)


def dask_setup(worker: Any) -> None:
    """Called by Dask in workers of this machine: the terminal has room for one bar alone."""
    disable_progress_bar()  # type: ignore[no-untyped-call]


class WorkerState:
    """All that a worker process keeps from task to task."""

    def __init__(self) -> None:
        self.model = threading.Lock()
        self.places = threading.BoundedSemaphore(2)
        self.stopped: set[str] = set()
        self._loaded: tuple[object, Loaded] | None = None
        self._station: tuple[CollectionSpec, ActivationProducer] | None = None

    @functools.cache  # noqa: B019  there is one workshop
    def commits(self, threads: int) -> ThreadPoolExecutor:
        """Threads that leave the processor to the model; used with a place only."""
        return ThreadPoolExecutor(threads, "commit", initializer=yield_to_others)

    def station(self, orders: CollectionSpec) -> ActivationProducer:
        """The model, loaded once; call with `model` held."""
        if orders.threads is not None:
            torch.set_num_threads(orders.threads)  # of the calling thread, so for each task
        config = replace(orders.config, device=_device(orders))
        key = [getattr(config, name) for name in _OF_THE_MODEL]
        if self._loaded is None or self._loaded[0] != key:
            self.clear()  # first, so that two models never have to fit
            self._loaded = key, load(config)
        if self._station is None or self._station[0].config != orders.config:
            self._leave_station()
            self._station = orders, ActivationProducer(config, self._loaded[1])
        return self._station[1]

    def files_digest(self) -> str | None:
        """Of the files that the model was loaded from; call with `model` held."""
        return None if self._loaded is None else self._loaded[1].files_digest()

    def forget_old_files(self, config: CollectConfig) -> None:
        """Forget a model that would be loaded from other files now; call with `model` held."""
        if self._loaded is not None and not _is_current(self._loaded[1].files, config):
            self.clear()

    def clear(self) -> None:
        """Forget the model."""
        self._leave_station()
        self._loaded = None

    def _leave_station(self) -> None:
        if self._station is not None:
            self._station[1].close()
        self._station = None


WORKER = WorkerState()


def _collect_part(orders: CollectionSpec, job: Job) -> Done | Failure:
    place = open_storage(orders.place)
    sides = tuple(
        side
        for side in job.sides
        if not place.exists(mark_path(job.part, acts_array(side.hookpoint, side.side)))
    )
    if not sides:
        return Done(0)  # by a worker that was given up too soon, or by another collection
    with WORKER.model:
        _refuse_if_stopped(orders)
        with _set_up():
            station = WORKER.station(orders)
            _refuse_other_content(orders, station)
        store = open_store(place)
        report = Report(orders, job)
        buffers = station.read(job.part, part_input(store, job.part), sides, report.advance)
    writer = Writer(place, store.layout, store.fingerprint)
    commits = WORKER.commits(write_threads(orders.config, store.storage))
    work = [commits.submit(commit_side, writer, job.part, *one) for one in buffers.items()]
    return Done(sum(results(work)))


class Report:
    """Tells the command how many rows of a part were read, and ends the part when it is told to."""

    def __init__(self, orders: CollectionSpec, job: Job) -> None:
        self.orders, self.job, self.rows = orders, job, 0
        self.told = time.monotonic()

    def advance(self, rows: int) -> None:
        _refuse_if_stopped(self.orders)
        self.rows += rows
        if time.monotonic() - self.told > _TELL_EVERY:
            self.told = time.monotonic()
            get_worker().log_event(self.orders.run, {"part": self.job.part, "rows": self.rows})


def _refuse_if_stopped(orders: CollectionSpec) -> None:
    if orders.run in WORKER.stopped:
        raise _Stopped


@contextlib.contextmanager
def _set_up() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Setup from error


def _refuse_other_content(orders: CollectionSpec, station: ActivationProducer) -> None:
    """A worker must see the very store, and compute with the very model, of the collection."""
    place = open_storage(orders.place)
    if not is_store(place) or read_store_file(place)["fingerprint"] != orders.fingerprint:
        raise UsageError(
            f"{place} must be one folder that all machines share, got another one on "
            f"{socket.gethostname()}; use a path on a shared file system"
        )
    identity = read_store_file(place)["identity"]
    found = {**station.facts.digests, "attention": station.facts.attention}
    if different := [name for name in found if found[name] != identity.get(name)]:
        raise UsageError(
            f"all machines must have the same model, got another {', '.join(different)} on "
            f"{socket.gethostname()}; copy the model there, or name its --revision"
        )


def _device(orders: CollectionSpec) -> str:
    name = str(get_worker().name)
    if orders.devices and name.isdecimal():
        return orders.devices[int(name) % len(orders.devices)]
    return orders.config.device


def _is_current(files: ModelFiles, config: CollectConfig) -> bool:
    """Whether a model would be loaded from the same files now."""
    try:
        return files.source == find_source(config) and files.is_unchanged()
    except (ValueError, OSError):
        return False  # loading says what is wrong


def _failure(error: Exception) -> Failure:
    cause = error.__cause__ if isinstance(error, _Setup) and error.__cause__ else error
    return Failure(
        _kind(cause),
        str(cause) if _kind(cause) in ("mistake", "place") else _in_a_line(cause),
        socket.gethostname(),
        get_worker().address,
        isinstance(error, _Setup),
        getattr(cause, "errno", None),
        getattr(cause, "filename", None),
    )


def _kind(error: BaseException) -> Kind:
    if isinstance(error, _Stopped):
        return "stopped"
    if isinstance(error, OSError) and error.errno in _PLACE:
        return "place"
    if isinstance(error, UsageError):
        return "mistake"
    return "fault"


def _in_a_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {told} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
