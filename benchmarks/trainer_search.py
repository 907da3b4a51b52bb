"""Search for the best rate of each coder, and for the penalty at which JumpReLU has K latents.

A training that the table has is not repeated: an interrupted search goes on when it is run again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from benchmarks.trainer_rates import scaled_rate
from benchmarks.trainer_settings import DEFAULT_SPARSITY, Setting, in_long_run
from benchmarks.trainer_table import TrainingRow, by_fvu, l0_miss
from mptrain.tuning.bracket import next_positions, value_at

SEEDS = (0, 1, 2)
_FACTOR = 2.0  # between two rates
_TRIES = 8  # penalties at one rate
_FIRST_FACTOR = 4.0  # between penalties, while all have too many or all too few latents
_LEAST_L0 = 0.01  # for logarithms


class Trainings(Protocol):
    """Trainings of one store, kept in a table."""

    def rows(self) -> list[TrainingRow]:
        """Those that the table has."""

    def start_rate(self, setting: Setting) -> float:
        """Where the search of a rate begins."""

    def resolved(self, setting: Setting) -> Setting:
        """The setting with the default rate of its tool, if it has no rate."""

    def train(self, setting: Setting) -> TrainingRow:
        """Train a setting, or read its row where the table has it."""


def best_of_search(setting: Setting, trainings: Trainings) -> TrainingRow:
    """The coder at its best rate: both neighbours are worse. The default rate counts too."""
    default = at_k_latents(setting, trainings)
    tried: dict[int, TrainingRow] = {}
    start = trainings.start_rate(setting)
    while wanted := next_positions({p: row.comparable_fvu for p, row in tried.items()}):
        for position in wanted:
            at_rate = replace(setting, lr=value_at(start, _FACTOR, position))
            tried[position] = at_k_latents(at_rate, trainings)
    return min([default, *tried.values()], key=by_fvu)


def with_all_seeds(best: TrainingRow, trainings: Trainings) -> list[TrainingRow]:
    """The coder at its best rate, with each seed."""
    return [at_k_latents(replace(best.setting, seed=seed), trainings) for seed in SEEDS]


def in_long_runs(best: TrainingRow, trainings: Trainings) -> list[TrainingRow]:
    """The coder in long runs: at the tool's default, and at its best rate scaled by our rule."""
    setting = in_long_run(best.setting)
    assert best.lr is not None
    scaled = replace(setting, lr=scaled_rate(best.lr, best, setting))
    return [at_k_latents(s, trainings) for s in (replace(setting, lr=None), scaled)]


def at_k_latents(setting: Setting, trainings: Trainings) -> TrainingRow:
    """The coder with K latents a row: the penalty of JumpReLU is searched until its L0 is K.

    Where no penalty has an L0 within 5 % of K, the coder with the nearest L0.
    """
    if setting.arch != "jumprelu":
        return trainings.train(setting)
    rows = trainings.rows()
    start = _start_sparsity(trainings.resolved(setting), rows)
    wanted = replace(trainings.resolved(setting), sparsity=None)
    tried = {r.sparsity: r for r in rows if replace(r.setting, sparsity=None) == wanted}
    while not any(_is_final(row) for row in tried.values()) and len(tried) < _TRIES:
        l0 = {sparsity: row.l0 for sparsity, row in tried.items() if sparsity is not None}
        sparsity = next_sparsity(l0, setting.k, start)
        tried[sparsity] = trainings.train(replace(setting, sparsity=sparsity))
    return min(tried.values(), key=l0_miss)


def next_sparsity(l0: Mapping[float, float], k: int, start: float) -> float:
    """The penalty to try next. A larger penalty leaves fewer latents.

    Between the penalties around K, on a line in logarithms; beyond all of them, where all have more
    than K latents or all have fewer.
    """
    above = [sparsity for sparsity, value in l0.items() if value > k]
    below = [sparsity for sparsity, value in l0.items() if value <= k]
    if not l0:
        return start
    if not below:
        return _rounded(max(above) * _FIRST_FACTOR)
    if not above:
        return _rounded(min(below) / _FIRST_FACTOR)
    low, high = max(above), min(below)
    top, bottom = math.log(l0[low] / k), math.log(max(l0[high], _LEAST_L0) / k)
    share = min(max(top / (top - bottom), 0.1), 0.9)
    return _rounded(low * (high / low) ** share)


def _is_final(row: TrainingRow) -> bool:
    return row.has_k_latents or not math.isfinite(row.fvu)


def _start_sparsity(setting: Setting, rows: Sequence[TrainingRow]) -> float:
    """The penalty of the most similar training with K latents a row."""

    def coder(of: Setting) -> tuple[object, ...]:
        return (of.tool, of.arch, of.normalise, of.kind, of.hookpoint, of.latents, of.k)

    def distance(row: TrainingRow) -> tuple[object, ...]:
        assert row.lr is not None
        assert setting.lr is not None
        rate = abs(math.log(row.lr / setting.lr))
        return (row.steps != setting.steps, rate, row.seed != setting.seed)

    similar = [row for row in rows if coder(row) == coder(setting) and row.has_k_latents]
    nearest = min(similar, key=distance, default=None)
    if nearest is None or nearest.sparsity is None:
        return DEFAULT_SPARSITY[setting.tool]
    return nearest.sparsity


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
