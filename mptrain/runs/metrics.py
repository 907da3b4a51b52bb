"""The lines of a run's `metrics.jsonl`: written while it trains, read back by plots and reports."""

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.data.atomic_files import NONFINITE, json_safe


@dataclass(frozen=True, kw_only=True)
class Record:
    """One coder at one log step."""

    coder: str
    "name of the coder"
    step: int
    "train steps done"
    rows: int
    "rows in the batches of this coder's train steps so far, filtered ones included"
    rows_trained: int | None = None
    "of these, the ones that its filters left; None: recorded by an earlier version"
    train_seconds: float
    "time in this coder's own train steps since the run began; neither waiting nor validation"
    wait_seconds: float
    "time the run waited for data since it began"
    validation_seconds: float = 0.0
    "time the run's validations took since it began, of all its coders"
    fvu: float
    "fraction of variance unexplained on the train batch, before its update; NaN: it had no rows"
    validation_fvu: float | None = None
    "fraction of variance unexplained on the validation rows; None: not evaluated; NaN: diverged"
    l0: float
    "latents with a non-zero value, mean over the rows of the train batch"
    dead_share: float
    "share of the latents that are dead"
    lr: float
    "learning rate of the step"
    rows_per_second: float
    "`rows_trained` by `train_seconds`"
    peak_memory_bytes: int
    "largest memory in use so far: of the GPU if there is one, else of the process"

    @property
    def is_diverged(self) -> bool:
        """Whether the coder diverged in this train step, its last one."""
        return self.validation_fvu is not None and math.isnan(self.validation_fvu)


class MetricsFile:
    """Writes a line for each record. Those that a full disk refuses are kept for later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""

    def add(self, record: Record) -> None:
        """Add a line; where that fails, warn and keep it."""
        was_waiting = bool(self._waiting)
        self._waiting += _line(record).encode()
        try:
            self._write()
        except OSError as error:
            if not was_waiting:
                told = f"{self.path} cannot be written ({error.strerror}); its lines wait in memory"
                warnings.warn(told, RuntimeWarning, stacklevel=2)

    def flush(self) -> None:
        """Bring all lines to the disk; OSError where it does not take them."""
        if self._waiting or self.path.exists():
            self._write(sync=True)

    def _write(self, *, sync: bool = False) -> None:
        with self.path.open("ab", buffering=0) as file:
            size, left = file.tell(), memoryview(self._waiting)
            try:
                while left:
                    left = left[file.write(left) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # a torn line would spoil those after it
                raise
        self._waiting = b""


def read_records(path: Path) -> list[Record]:
    """All records. A last line without its end is one that a crash or a running write tore.

    Raises:
        ValueError: another line is no record.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def rewind(path: Path, is_kept: Callable[[Record], bool]) -> None:
    """Drop all other records, and a torn line, so that a continued run repeats no line.

    A crash in between leaves the file as it was or as it should be. No file is no line.
    """
    if not path.exists():
        return
    kept = filter(is_kept, read_records(path))
    shorter = path.with_name(path.name + ".rewind")
    with shorter.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, kept))
        file.flush()
        os.fsync(file.fileno())
    shorter.replace(path)


def _line(record: Record) -> str:
    values = {name: json_safe(value) for name, value in asdict(record).items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _record(line: bytes, place: str) -> Record:
    try:
        values: dict[str, Any] = json.loads(line)
        values |= {name: float(value) for name, value in values.items() if value in NONFINITE}
        return Record(**values)
    except (ValueError, TypeError, AttributeError) as error:
        wanted = ", ".join(field.name for field in fields(Record))
        raise UsageError(f"{place} is not a record of {wanted}: {error}") from error
