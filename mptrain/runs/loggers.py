"""Loggers that show a run's records elsewhere: TensorBoard, Weights & Biases.

Loggers start again with each command and first get the records in `metrics.jsonl`. They therefore
show the same records as that file, however often the run was interrupted.
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
from mptrain.runs.metrics_file import Record, read_records

_PACKAGES: Mapping[Log, str] = {"tensorboard": "tensorboard", "wandb": "wandb"}


class MetricLogger(Protocol):
    """Shows records, which come in the order of their steps."""

    def add(self, record: Record) -> None: ...

    def close(self) -> None: ...


def check_installed(logs: Iterable[Log]) -> None:
    """Check that the packages of these loggers are installed.

    Raises:
        UsageError: a package is missing.
    """
    for log in logs:
        if importlib.util.find_spec(_PACKAGES[log]) is None:
            raise UsageError(
                f"--log {log} needs the package {_PACKAGES[log]}; run pip install "
                f"'mpcache[{log}]', or "
                f"remove {log} from --log"
            )


class MetricLoggers:
    """The loggers of one pass. A logger that fails is dropped with a warning; training goes on."""

    def __init__(self, logs: Sequence[Log], run: Path, coders: Sequence[CoderConfig]) -> None:
        self._loggers: dict[Log, MetricLogger] = {
            log: TensorBoard(run, coders) if log == "tensorboard" else WandB(run, coders)
            for log in logs
        }
        self._names = {coder.name for coder in coders}

    def catch_up(self, metrics: Path) -> None:
        """Send the records that `metrics.jsonl` has of the coders of this pass."""
        if self._loggers and metrics.exists():
            for record in read_records(metrics):
                if record.coder in self._names:
                    self.add(record)

    def add(self, record: Record) -> None:
        for log, logger in list(self._loggers.items()):
            if not _succeeds(log, partial(logger.add, record)):
                del self._loggers[log]
                with suppress(Exception):  # the user has a warning about this logger already
                    logger.close()

    def close(self) -> None:
        """Close all loggers, also where some of them fail."""
        for log, logger in self._loggers.items():
            _succeeds(log, logger.close)


def _succeeds(log: Log, call: Callable[[], None]) -> bool:
    """Call a logger; any exception becomes a warning, because it must not end the training."""
    try:
        call()
    except Exception as error:
        message = f"{log} failed and gets no more metrics: {error}; metrics.jsonl has all metrics"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return False
    return True


class TensorBoard:
    """Curves in RUN/tensorboard; each coder is a run of TensorBoard."""

    def __init__(self, run: Path, coders: Sequence[CoderConfig]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge from step 0: readers drop the points in the files of earlier commands
        self._writers: dict[str, Any] = {
            coder.name: SummaryWriter(run / "tensorboard" / coder.name, purge_step=0)
            for coder in coders
        }

    def add(self, record: Record) -> None:
        for name, value in _values(record).items():
            self._writers[record.coder].add_scalar(name, value, record.step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WandB:
    """A run of Weights & Biases for each coder, all in one group.

    The ids are kept in the run's folder, so that a later command resumes the same runs. The project
    is the environment variable WANDB_PROJECT, or mptrain.
    """

    def __init__(self, run: Path, coders: Sequence[CoderConfig]) -> None:
        import wandb

        group = _group(run)
        try:
            self._runs: dict[str, Any] = {
                coder.name: wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "mptrain"),
                    group=f"{run.name}-{group}",
                    id=f"{group}-{uuid.uuid5(uuid.NAMESPACE_OID, coder.name).hex}",
                    name=coder.name,
                    config=asdict(coder),
                    dir=run,
                    resume="allow",
                    reinit="create_new",
                )
                for coder in coders
            }
        except wandb.errors.Error as error:
            raise UsageError(
                f"Weights & Biases did not start: {error}; run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None
        # a resumed run refuses the steps that it already has
        self._first_step = {
            name: run.step if run.resumed else 0 for name, run in self._runs.items()
        }

    def add(self, record: Record) -> None:
        if record.step >= self._first_step[record.coder]:
            self._runs[record.coder].log(_values(record), step=record.step)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


def _group(run: Path) -> str:
    """Return a name that no other run has; it is drawn once and kept in the run's folder."""
    file = run / "wandb.json"
    if not file.exists():
        write_json(file, {"group": uuid.uuid4().hex[:12]})
    return str(read_json(file)["group"])


def _values(record: Record) -> dict[str, float]:
    """Return all numbers of a record except its step, without those that are None."""
    values = asdict(record)
    return {
        name: float(value)
        for name, value in values.items()
        if name not in ("coder", "step") and value is not None
    }
