"""A collection by the workers of a Dask cluster, on this machine or on others.

Dask's scheduler distributes the tasks, and runs the tasks of a lost worker again. A task may run
twice without harm, because a part that is committed is never written again.
"""

import contextlib
import os
import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from distributed.client import Future, as_completed
from distributed.scheduler import KilledWorker

from mpcache.collection import dask_worker
from mpcache.collection.dask_messages import CollectionSpec, Failure, PartDone
from mpcache.collection.jobs import Job, JobQueue, MissingPart
from mpcache.collection.producer import ModelFacts
from mpcache.collection.progress import Progress
from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.parallel.config import CollectParallelConfig
from mpcache.parallel.dask_cluster import connect
from mpcache.storage.base import Storage
from mpcache.store.store_metadata import read_store_file
from mpcache.untrusted_names import user_path

TRIES = 3
_THREADS = 2  # of a worker: it reads a part while it writes the part before
_QUEUED = 64  # tasks that the scheduler has at least; few enough to end soon after Ctrl-C
_STOP_SECONDS = 30.0  # for parts that are in work after Ctrl-C or an error


class DaskCollector:
    """A Dask client, and its cluster if the cluster was started for this collection."""

    def __init__(
        self,
        parallel: CollectParallelConfig,
        config: CollectConfig,
        storage: Storage,
        *,
        quiet: bool,
    ) -> None:
        self.parallel, self.storage, self.quiet = parallel, storage, quiet
        self.spec = _new_spec(parallel, config, storage)
        self._exits = contextlib.ExitStack()
        self._broken: dict[str, Failure] = {}

    def __enter__(self) -> "DaskCollector":
        preload = dask_worker.__name__
        self.client = self._exits.enter_context(
            connect(self.parallel, threads=_THREADS, preload=preload, quiet=self.quiet)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def model_facts(self) -> ModelFacts:
        """What a worker reports of the model. All workers are asked, so that all load it now."""
        futures = [
            self.client.submit(
                dask_worker.get_model_facts, self.spec, key=("facts", self.spec.run, n)
            )
            for n in range(len(self._usable_workers()))
        ]
        failures = []
        for future in as_completed(futures, loop=self.client.loop):
            outcome = self._outcome(future)
            if isinstance(outcome, ModelFacts):
                return outcome
            failures.append(outcome)
        raise failures[0].as_exception()

    def collect_parts(self, jobs: Sequence[Job], progress: Progress) -> tuple[MissingPart, ...]:
        """Have all jobs done by workers. Returns the parts that failed three times."""
        fingerprint = read_store_file(self.storage)["fingerprint"]
        self.spec = replace(self.spec, fingerprint=fingerprint)
        queue, missing = JobQueue(jobs, TRIES), list[MissingPart]()
        pending: dict[Future, Job] = {}
        reports = _ProgressReports(progress)
        self.client.subscribe_topic(self.spec.run, reports)
        completed = as_completed(loop=self.client.loop)
        try:
            while queue or pending:
                self._submit_jobs(queue, pending, completed)
                future = next(completed)
                if future.status in ("lost", "pending"):
                    completed.add(future)  # its worker died with the result; the task runs again
                    continue
                job, outcome = pending.pop(future), self._outcome(future)
                if isinstance(outcome, PartDone):
                    reports.show_done(job, outcome)
                elif failed := self._retry(job, outcome, queue, progress):
                    missing.append(failed)
        except BaseException:
            self._stop(pending)
            raise
        finally:
            self.client.unsubscribe_topic(self.spec.run)
        return tuple(missing)

    def _submit_jobs(
        self, queue: JobQueue, pending: dict[Future, Job], completed: as_completed
    ) -> None:
        """Let the scheduler have enough tasks."""
        workers = self._usable_workers()
        while queue and len(pending) < max(_QUEUED, 2 * _THREADS * len(workers)):
            job = queue.take()
            future = self.client.submit(
                dask_worker.collect_part,
                self.spec,
                job,
                key=(f"part-{self.spec.run}", job.part, queue.failures(job), len(self._broken)),
                workers=workers if self._broken else None,
                pure=False,
            )
            pending[future] = job
            completed.add(future)

    def _retry(
        self, job: Job, failure: Failure, queue: JobQueue, progress: Progress
    ) -> MissingPart | None:
        """Let a failed job wait again, or give it up. Raises what no other try can change."""
        progress.set_rows(job.part, 0)
        if failure.is_setup:
            self._leave_out(failure, progress)
            queue.put_back(job)
            return None
        if failure.kind != "fault":
            raise failure.as_exception()
        if queue.put_back_failed(job):
            return None
        progress.print_line(f"part {job.part} is given up: {failure.description}")
        return MissingPart(job.part, TRIES, failure.description)

    def _usable_workers(self) -> list[str]:
        """Addresses of the workers that are there now, without those that cannot serve."""
        addresses = self.client.scheduler_info(n_workers=-1)["workers"]
        return [address for address in addresses if address not in self._broken]

    def _leave_out(self, failure: Failure, progress: Progress) -> None:
        """Give the tasks of a worker that cannot serve to others, while there are others."""
        if failure.worker not in self._broken:
            self._broken[failure.worker] = failure
            progress.print_line(f"worker {failure.worker} is left out: {failure.description}")
        if not self._usable_workers():
            raise failure.as_exception()

    def _outcome(self, future: Future) -> Any:
        """What a task returned, or a failure that says why it returned nothing."""
        if future.status == "finished":
            return future.result()
        if future.status == "error":
            return _failure_of_dask(future.exception())
        raise ConnectionError(
            f"the Dask scheduler {self.client.scheduler.address} was lost; the parts in the "
            "store are kept: run the same command again to continue"
        )

    def _stop(self, pending: dict[Future, Job]) -> None:
        """End running tasks soon and cleanly: parts that were read are committed."""
        with contextlib.suppress(Exception):  # the workers or the scheduler may be lost
            self.client.run(dask_worker.stop, self.spec.run, on_error="ignore")
            for _ in as_completed(list(pending), loop=self.client.loop, timeout=_STOP_SECONDS):
                pass


class _ProgressReports:
    """Shows the reports of workers. A late report does not undo a part that is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, event: tuple[float, dict[str, int]]) -> None:
        """Called by Dask with the time and the content of a report."""
        _, report = event
        with self._lock:
            if report["part"] not in self._done:
                self._progress.set_rows(report["part"], report["rows"])

    def show_done(self, job: Job, outcome: PartDone) -> None:
        with self._lock:
            self._done.add(job.part)
            self._progress.set_rows(job.part, job.rows)
            self._progress.add_bytes(outcome.bytes)


def _failure_of_dask(error: BaseException) -> Failure:
    """A task that ended without a result of its own."""
    if isinstance(error, KilledWorker):
        times = error.allowed_failures + 1
        message = f"its workers died {times} times; out of memory?"
        return Failure("fault", message, worker=str(error.last_worker.address))
    if isinstance(error, ImportError):
        return Failure(
            "usage", f"workers must have the same mpcache, got {error}; install it there"
        )
    return Failure("fault", f"{type(error).__name__}: {error}")


def _new_spec(
    parallel: CollectParallelConfig, config: CollectConfig, storage: Storage
) -> CollectionSpec:
    devices = _devices(config, parallel.workers) if parallel.workers else ()
    threads = None
    if parallel.workers and not devices:
        threads = max(1, torch.get_num_threads() // parallel.workers)
    return CollectionSpec(
        run=f"mpcache-{uuid.uuid4().hex}",
        config=_with_absolute_model(config),
        address=storage.address,
        threads=threads,
        devices=devices,
    )


def _with_absolute_model(config: CollectConfig) -> CollectConfig:
    """The model's folder or file by its absolute path: workers have other working directories."""
    path = user_path(config.model)
    return replace(config, model=str(path.absolute())) if os.path.exists(path) else config


def _devices(config: CollectConfig, workers: int) -> tuple[str, ...]:
    """A GPU for each worker; none if the model runs on the CPU."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return ()
    if config.device not in ("auto", "cuda"):
        if workers == 1:
            return (config.device,)
        raise UsageError(
            f"device must be auto, cuda or cpu with {workers} workers, got {config.device}"
        )
    count = torch.cuda.device_count()
    if workers > count:
        raise UsageError(f"workers must not exceed the {count} GPUs of this machine, got {workers}")
    return tuple(f"cuda:{number}" for number in range(workers))
