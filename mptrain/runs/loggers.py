"""Who else sees a run's records as they come: TensorBoard, Weights & Biases.

They begin anew with each command, and are first told the records that metrics.jsonl keeps, so that
what they show is what it says, however often the run was stopped.
"""

import importlib.util
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.config.run import Log
from mptrain.data.atomic_files import read_json, write_json
from mptrain.runs.metrics import Record, read_records

_PACKAGES: Mapping[Log, str] = {"tensorboard": "tensorboard", "wandb": "wandb"}


class MetricLogger(Protocol):
    """Takes records in the order of their steps."""

    def add(self, record: Record) -> None: ...

    def close(self) -> None: ...


def check_installed(logs: Iterable[Log]) -> None:
    """ValueError where a package is missing, before anything is begun."""
    for log in logs:
        if importlib.util.find_spec(_PACKAGES[log]) is None:
            raise UsageError(
                f"log {log} needs the package {_PACKAGES[log]}; pip install 'mpcache[{log}]', or "
                f"leave {log} out"
            )


class MetricLoggers:
    """All followers of the coders of one pass. One that fails is left out; training goes on."""

    def __init__(self, logs: Sequence[Log], run: Path, coders: Sequence[CoderConfig]) -> None:
        self._followers: dict[Log, MetricLogger] = {
            log: TensorBoard(run, coders) if log == "tensorboard" else WandB(run, coders)
            for log in logs
        }
        self._names = {one.name for one in coders}

    def catch_up(self, metrics: Path) -> None:
        """Tell them what was recorded of their coders before they came."""
        if self._followers and metrics.exists():
            for record in read_records(metrics):
                if record.coder in self._names:
                    self.add(record)

    def add(self, record: Record) -> None:
        for log, follower in list(self._followers.items()):
            if not _done(log, partial(follower.add, record)):
                del self._followers[log]
                with suppress(Exception):  # its failure is told already
                    follower.close()

    def close(self) -> None:
        """End them all, also where some fail."""
        for log, follower in self._followers.items():
            _done(log, follower.close)


def _done(log: Log, call: Callable[[], None]) -> bool:
    """Whether a follower did it; what others' services raise must not end a training."""
    try:
        call()
    except Exception as error:
        told = f"{log} failed and gets no more records: {error}; metrics.jsonl has them all"
        warnings.warn(told, RuntimeWarning, stacklevel=3)
        return False
    return True


class TensorBoard:
    """Curves in RUN/tensorboard, where each coder is a run of TensorBoard's."""

    def __init__(self, run: Path, coders: Sequence[CoderConfig]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # from step 0 on, readers drop what files of earlier commands hold
        self._writers: dict[str, Any] = {
            one.name: SummaryWriter(run / "tensorboard" / one.name, purge_step=0) for one in coders
        }

    def add(self, record: Record) -> None:
        for name, value in _values(record).items():
            self._writers[record.coder].add_scalar(name, value, record.step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WandB:
    """A run of Weights & Biases for each coder, all in one group; resumed by ids kept in the run.

    The project is that of WANDB_PROJECT, or mptrain.
    """

    def __init__(self, run: Path, coders: Sequence[CoderConfig]) -> None:
        import wandb

        group = _group(run)
        try:
            self._runs: dict[str, Any] = {
                one.name: wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "mptrain"),
                    group=f"{run.name}-{group}",
                    id=f"{group}-{uuid.uuid5(uuid.NAMESPACE_OID, one.name).hex}",
                    name=one.name,
                    config=asdict(one),
                    dir=run,
                    resume="allow",
                    reinit="create_new",
                )
                for one in coders
            }
        except wandb.errors.Error as error:
            raise UsageError(
                f"Weights & Biases did not start: {error}; use `wandb login`, or WANDB_MODE=offline"
            ) from None
        # what it has from before it was stopped, it would refuse
        self._first = {name: one.step if one.resumed else 0 for name, one in self._runs.items()}

    def add(self, record: Record) -> None:
        if record.step >= self._first[record.coder]:
            self._runs[record.coder].log(_values(record), step=record.step)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


def _group(run: Path) -> str:
    """A name that no other run has, made once."""
    file = run / "wandb.json"
    if not file.exists():
        write_json(file, {"group": uuid.uuid4().hex[:12]})
    return str(read_json(file)["group"])


def _values(record: Record) -> dict[str, float]:
    """All numbers of a record but its step; what was not evaluated is left out."""
    found = {name: value for name, value in asdict(record).items() if name not in ("coder", "step")}
    return {name: float(value) for name, value in found.items() if value is not None}
