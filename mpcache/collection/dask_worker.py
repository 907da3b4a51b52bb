"""What runs in the worker processes of a Dask cluster. The model stays loaded between parts."""

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from distributed.worker import get_worker
from transformers.utils.logging import disable_progress_bar

from mpcache.collection.commit_threads import (
    commit_side,
    lower_priority,
    wait_for_all,
    write_threads,
)
from mpcache.collection.dask_messages import (
    CollectionSpec,
    Failure,
    PartDone,
    SetupError,
    StoppedError,
    describe_failure,
)
from mpcache.collection.jobs import Job
from mpcache.collection.producer import (
    ActivationProducer,
    LoadedModel,
    ModelFacts,
    load_for_collection,
)
from mpcache.collection.wanted_parts import side_array
from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.model.cut_batches import part_input
from mpcache.model.file_snapshot import ModelFileSnapshot
from mpcache.model.model_source import find_source
from mpcache.storage.base import Storage, open_storage
from mpcache.store.object_paths import mark_path
from mpcache.store.reader import open_store
from mpcache.store.store_metadata import is_store, read_store_file
from mpcache.store.writer import Writer

_REPORT_SECONDS = 0.5  # between two reports of progress
# These fields decide how a model is loaded. The others only decide how it is used.
_LOADING_FIELDS = (
    "model", "revision", "model_dtype", "autocast", "attention", "trust_remote_code", "device",
    "ctx_len",
)  # fmt: skip


# --- tasks ---


def get_model_facts(spec: CollectionSpec) -> ModelFacts | Failure:
    """Load the model, and describe it for the store."""
    try:
        with _as_setup(), WORKER.model_lock:
            WORKER.forget_changed_model(spec.config)
            facts = WORKER.producer(spec).facts
            is_known = is_store(open_storage(spec.address))
            return replace(facts, model_files=None if is_known else WORKER.files_digest())
    except Exception as error:
        return describe_failure(error, get_worker().address)


def collect_part(spec: CollectionSpec, job: Job) -> PartDone | Failure:
    """Read one part, and commit the sides that it still lacks."""
    try:
        # A cluster may run more tasks in a process than fit its memory: one reads, one writes.
        with WORKER.part_slots:
            return _collect_part(spec, job)
    except Exception as error:
        return describe_failure(error, get_worker().address)


def stop(run: str) -> None:
    """End the tasks of a collection soon: parts that were read are committed, no other is read."""
    WORKER.stopped_runs.add(run)


def dask_setup(worker: Any) -> None:
    """Called by Dask in the workers of this machine: the terminal has room for one bar only."""
    disable_progress_bar()  # type: ignore[no-untyped-call]


# --- state of the process ---


class WorkerState:
    """What a worker process keeps from task to task."""

    def __init__(self) -> None:
        self.model_lock = threading.Lock()
        self.part_slots = threading.BoundedSemaphore(2)
        self.stopped_runs: set[str] = set()
        self._loaded: tuple[object, LoadedModel] | None = None
        self._producer: tuple[CollectionSpec, ActivationProducer] | None = None

    @functools.cache  # noqa: B019  a process has one state
    def commit_pool(self, threads: int) -> ThreadPoolExecutor:
        """Threads that leave the processor to the model."""
        return ThreadPoolExecutor(threads, "commit", initializer=lower_priority)

    def producer(self, spec: CollectionSpec) -> ActivationProducer:
        """The model, which is loaded once. The caller holds `model_lock`."""
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)  # of the calling thread, so for each task
        config = replace(spec.config, device=_device(spec))
        key = [getattr(config, name) for name in _LOADING_FIELDS]
        if self._loaded is None or self._loaded[0] != key:
            self.clear()  # first, so that memory never has to hold two models
            self._loaded = key, load_for_collection(config)
        if self._producer is None or self._producer[0].config != spec.config:
            self._close_producer()
            self._producer = spec, ActivationProducer(config, self._loaded[1])
        return self._producer[1]

    def files_digest(self) -> str | None:
        """Digest of the files that the model was loaded from. The caller holds `model_lock`."""
        return None if self._loaded is None else self._loaded[1].files_digest()

    def forget_changed_model(self, config: CollectConfig) -> None:
        """Forget the model if other files would be loaded now. The caller holds `model_lock`."""
        if self._loaded is not None and not _is_current(self._loaded[1].files, config):
            self.clear()

    def clear(self) -> None:
        """Forget the model."""
        self._close_producer()
        self._loaded = None

    def _close_producer(self) -> None:
        if self._producer is not None:
            self._producer[1].close()
        self._producer = None


WORKER = WorkerState()


# --- one part ---


def _collect_part(spec: CollectionSpec, job: Job) -> PartDone | Failure:
    storage = open_storage(spec.address)
    with _as_setup():
        _check_same_store(spec, storage)
    sides = tuple(
        side for side in job.sides if not storage.exists(mark_path(job.part, side_array(side)))
    )
    if not sides:
        return PartDone(0)  # a worker that was taken for lost committed it, or another collection
    with WORKER.model_lock:
        _raise_if_stopped(spec)
        with _as_setup():
            producer = WORKER.producer(spec)
            _check_same_model(storage, producer)
        store = open_store(storage)
        report = RowReport(spec, job)
        buffers = producer.read_part(job.part, part_input(store, job.part), sides, report.add)
    writer = Writer(storage, store.layout, store.fingerprint)
    pool = WORKER.commit_pool(write_threads(spec.config, store.storage))
    commits = [pool.submit(commit_side, writer, job.part, *item) for item in buffers.items()]
    return PartDone(sum(wait_for_all(commits)))


class RowReport:
    """Reports how many rows of a part were read, and ends the part if its collection stopped."""

    def __init__(self, spec: CollectionSpec, job: Job) -> None:
        self.spec, self.job, self.rows = spec, job, 0
        self._reported = time.monotonic()

    def add(self, rows: int) -> None:
        _raise_if_stopped(self.spec)
        self.rows += rows
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            self._reported = time.monotonic()
            get_worker().log_event(self.spec.run, {"part": self.job.part, "rows": self.rows})


def _raise_if_stopped(spec: CollectionSpec) -> None:
    if spec.run in WORKER.stopped_runs:
        raise StoppedError


@contextlib.contextmanager
def _as_setup() -> Iterator[None]:
    """An error in this context means that the worker cannot serve the collection."""
    try:
        yield
    except Exception as error:
        raise SetupError from error


def _check_same_store(spec: CollectionSpec, storage: Storage) -> None:
    """A worker must see the store of the collection."""
    if not is_store(storage) or read_store_file(storage)["fingerprint"] != spec.fingerprint:
        raise UsageError(
            f"{storage} must be the same folder on all machines, got a different folder on "
            f"{socket.gethostname()}; give a path on a shared file system"
        )


def _check_same_model(storage: Storage, producer: ActivationProducer) -> None:
    """A worker must compute with the model that the store names."""
    identity = read_store_file(storage)["identity"]
    computed = {**producer.facts.digests, "attention": producer.facts.attention}
    if different := [name for name in computed if computed[name] != identity.get(name)]:
        raise UsageError(
            f"all machines must have the same model, got a different {', '.join(different)} on "
            f"{socket.gethostname()}; copy the model to that machine, or give the model's "
            "version with --revision"
        )


def _device(spec: CollectionSpec) -> str:
    name = str(get_worker().name)
    if spec.devices and name.isdecimal():
        return spec.devices[int(name) % len(spec.devices)]
    return spec.config.device


def _is_current(files: ModelFileSnapshot, config: CollectConfig) -> bool:
    """Whether a model would be loaded from the same files now."""
    try:
        return files.source == find_source(config) and files.is_unchanged()
    except (ValueError, OSError):
        return False  # loading reports what is wrong
