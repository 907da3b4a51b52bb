"""The records in a run's `metrics.jsonl`: written in training, read by plots and reports."""

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.data.atomic_files import NONFINITE, json_safe, write_text


@dataclass(frozen=True, kw_only=True)
class Record:
    """One coder at one log step."""

    coder: str
    "name of the coder"
    step: int
    "train steps done"
    rows: int
    "rows in the batches of this coder's train steps so far, before its filters"
    rows_trained: int | None = None
    "of `rows`, the rows that its filters kept; None: recorded by an earlier version"
    train_seconds: float
    "seconds in this coder's own train steps so far, without waiting and validation"
    wait_seconds: float
    "seconds that the run has waited for data so far"
    validation_seconds: float = 0.0
    "seconds that the run has evaluated its coders so far, all of them together"
    fvu: float
    "fraction of variance unexplained (FVU) on the train batch, before the update; NaN: no rows"
    validation_fvu: float | None = None
    "FVU on the validation rows; None: not evaluated at this step; NaN: the coder diverged"
    l0: float
    "number of latents with a non-zero value, mean over the rows of the train batch"
    dead_share: float
    "share of the latents that have not fired in the last `dead_rows` rows"
    lr: float
    "learning rate of the train step"
    rows_per_second: float
    "`rows_trained` by `train_seconds`"
    peak_memory_bytes: int
    "peak memory so far: allocations on the GPU, or resident memory of the process on a CPU"

    @property
    def is_diverged(self) -> bool:
        """Whether the coder diverged in this train step, which is its last."""
        return self.validation_fvu is not None and math.isnan(self.validation_fvu)


class MetricsFile:
    """Appends a line for each record. Lines that a full disk refuses are kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = b""

    def add(self, record: Record) -> None:
        """Append a line; where that fails, warn and keep the line for the next time."""
        had_pending = bool(self._pending)
        self._pending += _line(record).encode()
        try:
            self._write()
        except OSError as error:
            if not had_pending:
                warnings.warn(
                    f"{self.path} cannot be written ({error.strerror}); its new lines stay in "
                    "memory until the next try",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def flush(self) -> None:
        """Bring all lines to the disk.

        Raises:
            OSError: the disk does not take them.
        """
        if self._pending or self.path.exists():
            self._write(sync=True)

    def _write(self, *, sync: bool = False) -> None:
        with self.path.open("ab", buffering=0) as file:
            size, rest = file.tell(), memoryview(self._pending)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(size)  # a torn line would spoil those after it
                raise
        self._pending = b""


def read_records(path: str | Path) -> list[Record]:
    """Return all records of a run, in the order of its train steps.

    A run that is under way can be read: a last line without its end is left out.

    Example:
        >>> from mptrain import read_records
        >>> records = read_records("run/metrics.jsonl")
        >>> [record.step for record in records if record.validation_fvu is not None]
        [5, 8, 9, 14, 16, 20, 22, 24]

    Args:
        path: the file `RUN/metrics.jsonl`.

    Raises:
        UsageError (a ValueError): a line is not a record.
        FileNotFoundError: there is no such file.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def rewind(path: Path, is_kept: Callable[[Record], bool]) -> None:
    """Rewrite the file with the records to keep, so that a continued run repeats no line.

    A crash leaves the old file or the new one. No-op where there is no file.
    """
    if path.exists():
        write_text(path, "".join(map(_line, filter(is_kept, read_records(path)))))


def _line(record: Record) -> str:
    values = {name: json_safe(value) for name, value in asdict(record).items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _parse(line: bytes, location: str) -> Record:
    try:
        values: dict[str, Any] = json.loads(line)
        values |= {name: float(value) for name, value in values.items() if value in NONFINITE}
        return Record(**values)
    except (ValueError, TypeError, AttributeError) as error:
        wanted = ", ".join(field.name for field in fields(Record))
        raise UsageError(
            f"{location} is damaged, or of another version: it must have the fields {wanted} "
            f"({error}); copy the file again, or use the version of mptrain that wrote it"
        ) from error
