"""The table of trainings: a row for each, with its setting and its figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.csv_table import read_rows
from benchmarks.trainer_settings import Setting

L0_TOLERANCE = 0.05
"L0 over K - 1 at most, for a coder to be compared with others of this K"
_TEXTS = ("tool", "arch", "kind", "hookpoint", "store", "version", "rate")
_INTEGERS = ("latents", "k", "batch_rows", "steps", "seed", "threads")


@dataclass(frozen=True, kw_only=True)
class TrainingRow(Setting):
    """A training and its figures; `lr` is the rate that it had."""

    store: str
    version: str
    "of the tool"
    rate: str
    "default, or given by the search"
    fvu: float
    "on the half of the held-out rows that chooses; infinite if the coder diverged"
    report_fvu: float
    "on the other half"
    l0: float
    "on all held-out rows; the share of dead latents too"
    dead_share: float
    train_seconds: float
    threads: int

    @property
    def has_k_latents(self) -> bool:
        """Whether its L0 is K, within 5 %."""
        return abs(self.l0 / self.k - 1) <= L0_TOLERANCE

    @property
    def setting(self) -> Setting:
        return Setting(**{field.name: getattr(self, field.name) for field in fields(Setting)})

    @property
    def comparable_fvu(self) -> float:
        """What chooses a rate; infinite where a penalty did not reach K latents a row."""
        is_reached = self.sparsity is None or self.has_k_latents
        return self.fvu if is_reached and math.isfinite(self.fvu) else math.inf


def l0_miss(row: TrainingRow) -> float:
    """How far L0 is from K: the logarithm of the factor between them, without its sign."""
    return abs(math.log(max(row.l0, 1e-3) / row.k))


def by_fvu(row: TrainingRow) -> tuple[float, float]:
    """For the best coder: by FVU, or where none has K latents, by the distance of L0 from K."""
    return row.comparable_fvu, l0_miss(row)


def read_table(path: Path) -> list[TrainingRow]:
    """The trainings of a table, in their order."""
    return [parse_row(row) for row in read_rows(path)]


def parse_row(row: Mapping[str, str]) -> TrainingRow:
    """A training from the text of its columns."""
    values: dict[str, Any] = {}
    for name, text in row.items():
        if name in _TEXTS:
            values[name] = text
        elif name in _INTEGERS:
            values[name] = int(text)
        elif name == "normalise":
            values[name] = text == "True"
        else:
            values[name] = float(text) if text else None
    return TrainingRow(**values)
