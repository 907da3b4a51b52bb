"""The workers of a Dask cluster, of this machine or any other, as the command sees them.

The scheduler gives tasks out and does those of a lost worker again. Whatever a task does twice is
harmless, because parts are committed create-only: nothing here has to know who else is at work.
"""

import contextlib
import os
import threading
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from distributed.client import Future, as_completed
from distributed.scheduler import KilledWorker

from mpcache.collection import dask_worker as remote
from mpcache.collection.dask_worker import CollectionSpec, Done, Failure
from mpcache.collection.jobs import Job, Missing, Progress
from mpcache.collection.producer import ModelFacts
from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.parallel.config import CollectParallelConfig
from mpcache.parallel.dask_cluster import connected
from mpcache.storage.base import Storage, open_storage
from mpcache.store.description import read_store_file
from mpcache.validation import user_path

TRIES = 3
_THREADS = 2  # of a worker: one part is read while the one before is written
_AHEAD = 64  # tasks that the scheduler has at least; few enough to end soon after Ctrl-C
_ENDING = 30.0  # seconds that parts in hand get after Ctrl-C or an error


class DaskCollector:
    """A Dask client, and the cluster behind it where that is ours."""

    def __init__(
        self, parallel: CollectParallelConfig, config: CollectConfig, place: Storage, *, quiet: bool
    ) -> None:
        self.parallel, self.quiet = parallel, quiet
        devices = _devices(config, parallel.workers) if parallel.workers else ()
        threads = None
        if parallel.workers and not devices:
            threads = max(1, torch.get_num_threads() // parallel.workers)
        self.orders = CollectionSpec(
            run=f"mpcache-{uuid.uuid4().hex}",
            config=_from_anywhere(config),
            place=place.address,
            threads=threads,
            devices=devices,
        )
        self.exits = contextlib.ExitStack()
        self.broken: dict[str, Failure] = {}

    def __enter__(self) -> "DaskCollector":
        self.client = self.exits.enter_context(
            connected(
                self.parallel,
                threads=_THREADS,
                preload="mpcache.collection.dask_worker",
                quiet=self.quiet,
            )
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.exits.close()

    def addresses(self) -> list[str]:
        """Of the workers there are now, without those that cannot serve."""
        there = self.client.scheduler_info(n_workers=-1)["workers"]
        return [address for address in there if address not in self.broken]

    def facts(self) -> ModelFacts:
        """What a worker says of the model; all are asked, so that all load it now."""
        futures = [
            self.client.submit(remote.facts, self.orders, key=("facts", self.orders.run, n))
            for n in range(len(self.addresses()))
        ]
        failures = []
        for future in as_completed(futures, loop=self.client.loop):
            outcome = self._outcome(future)
            if isinstance(outcome, ModelFacts):
                return outcome
            failures.append(outcome)
        raise _raisable(failures[0])

    # --- parts ---

    def work(self, jobs: Sequence[Job], progress: Progress) -> tuple[Missing, ...]:
        """Have all jobs done; gives those that failed three times."""
        fingerprint = read_store_file(open_storage(self.orders.place))["fingerprint"]
        self.orders = replace(self.orders, fingerprint=fingerprint)
        shown = _Shown(progress)
        self.client.subscribe_topic(self.orders.run, shown)
        waiting, pending = deque(jobs), dict[Future, Job]()
        tries: Counter[Job] = Counter()
        missing: list[Missing] = []
        completed = as_completed(loop=self.client.loop)
        try:
            while waiting or pending:
                while waiting and len(pending) < max(_AHEAD, 2 * _THREADS * len(self.addresses())):
                    job = waiting.popleft()
                    future = self._submit(job, tries[job])
                    pending[future] = job
                    completed.add(future)
                future = next(completed)
                if future.status in ("lost", "pending"):
                    completed.add(future)  # its worker died with the answer; it is done again
                    continue
                job = pending.pop(future)
                outcome = self._outcome(future)
                if isinstance(outcome, Done):
                    shown.done(job, outcome)
                    continue
                progress.read(job.part, 0)
                if outcome.is_setup:
                    self._give_up(outcome, progress)
                    waiting.append(job)
                    continue
                if outcome.kind in ("mistake", "place", "stopped"):
                    raise _raisable(outcome)
                tries[job] += 1
                if tries[job] < TRIES:
                    waiting.append(job)
                else:
                    missing.append(Missing(job.part, TRIES, _told(outcome)))
                    progress.tell(f"part {job.part} is given up: {_told(outcome)}")
        except BaseException:
            self._stop(pending)
            raise
        finally:
            self.client.unsubscribe_topic(self.orders.run)
        return tuple(missing)

    def _submit(self, job: Job, times: int) -> Future:
        return self.client.submit(
            remote.collect_part,
            self.orders,
            job,
            key=(f"part-{self.orders.run}", job.part, times, len(self.broken)),
            workers=self.addresses() if self.broken else None,
            pure=False,
        )

    def _outcome(self, future: Future) -> Any:
        """What a task gave back, or a failure that says why it gave nothing."""
        if future.status == "finished":
            return future.result()
        if future.status != "error":
            raise ConnectionError(
                f"the Dask scheduler {self.client.scheduler.address} was lost; what was committed "
                "stays, the same command goes on from there"
            )
        error = future.exception()
        if isinstance(error, KilledWorker):
            told = f"its workers died {error.allowed_failures + 1} times; out of memory?"
            return Failure("fault", told, "", str(error.last_worker.address), is_setup=False)
        if isinstance(error, ImportError):
            told = f"workers must have the same mpcache, got {error}; install it there"
            return Failure("mistake", told, "", "", is_setup=False)
        told = f"{type(error).__name__}: {error}"
        return Failure("fault", told, "", "", is_setup=False)

    def _give_up(self, failure: Failure, progress: Progress) -> None:
        """A worker cannot serve: its tasks go elsewhere, while there are others."""
        if failure.worker not in self.broken:
            self.broken[failure.worker] = failure
            progress.tell(f"worker {failure.worker} is left out: {_told(failure)}")
        if not self.addresses():
            raise _raisable(failure)

    def _stop(self, pending: dict[Future, Job]) -> None:
        """End what runs, soon and cleanly; parts that were read are committed."""
        with contextlib.suppress(Exception):  # the workers or the scheduler may be what was lost
            self.client.run(remote.stop, self.orders.run, on_error="ignore")
            for _ in as_completed(list(pending), loop=self.client.loop, timeout=_ENDING):
                pass


class _Shown:
    """Reports of the workers -> the bar. A late report must not undo a part that is done."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._done: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, event: tuple[float, dict[str, int]]) -> None:
        _, told = event
        with self._lock:
            if told["part"] not in self._done:
                self.progress.read(told["part"], told["rows"])

    def done(self, job: Job, outcome: Done) -> None:
        with self._lock:
            self._done.add(job.part)
            self.progress.read(job.part, job.rows)
            self.progress.committed(outcome.bytes)


def _told(failure: Failure) -> str:
    place = failure.host or failure.worker
    return f"{failure.told} on {place}" if place else failure.told


def _raisable(failure: Failure) -> Exception:
    if failure.kind == "stopped":
        return ConnectionError("another command stopped this collection")
    if failure.kind == "mistake":
        return ValueError(failure.told)
    if failure.errno is not None:
        return OSError(failure.errno, os.strerror(failure.errno), failure.filename)
    return OSError(_told(failure))


# --- where workers are ---


def _from_anywhere(config: CollectConfig) -> CollectConfig:
    """The model's folder or file by its whole path: workers start elsewhere."""
    path = user_path(config.model)
    return replace(config, model=str(path.absolute())) if os.path.exists(path) else config


def _devices(config: CollectConfig, workers: int) -> tuple[str, ...]:
    """A GPU for each worker; none where the model runs on the CPU."""
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
        raise UsageError(f"workers must not exceed the GPUs here, {count}, got {workers}")
    return tuple(f"cuda:{number}" for number in range(workers))
