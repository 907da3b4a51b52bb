"""The design of the comparison of trainers, its searches, and the table that keeps them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.csv_table import append_rows
from benchmarks.trainer_rates import scaled_rate
from benchmarks.trainer_report import markdown
from benchmarks.trainer_search import (
    at_k_latents,
    best_of_search,
    in_long_runs,
    next_sparsity,
    with_all_seeds,
)
from benchmarks.trainer_settings import Setting, chosen, coders, fit_config
from benchmarks.trainer_table import TrainingRow, read_table
from mpcache.errors import UsageError
from mptrain.training.learning_rate import RULES

TOPK = Setting(tool="sae-lens", arch="topk")
JUMPRELU = Setting(tool="sae-lens", arch="jumprelu")


def row(setting: Setting, fvu: float, l0: float = 16.0, rate: str = "searched") -> TrainingRow:
    return TrainingRow(
        **vars(setting), store="demo", version="1.2", rate=rate, fvu=fvu, report_fvu=fvu + 0.01,
        l0=l0, dead_share=0.25, train_seconds=3.5, threads=1,
    )  # fmt: skip


class CountedTrainings:
    """FVU falls towards a rate of 0.01; L0 is `8 / sparsity`."""

    def __init__(self, known: list[TrainingRow] | None = None) -> None:
        self.known = list(known or [])
        self.trained: list[Setting] = []

    def rows(self) -> list[TrainingRow]:
        return list(self.known)

    def start_rate(self, setting: Setting) -> float:
        return 0.001

    def resolved(self, setting: Setting) -> Setting:
        return replace(setting, lr=setting.lr or 3e-4)

    def train(self, setting: Setting) -> TrainingRow:
        setting = self.resolved(setting)
        if known := [row for row in self.known if row.setting == setting]:
            return known[0]
        self.trained.append(setting)
        assert setting.lr is not None
        fvu = 0.2 + abs(math.log(setting.lr / 0.01)) / 100
        l0 = 16.0 if setting.sparsity is None else 8 / setting.sparsity
        self.known.append(row(setting, fvu, l0))
        return self.known[-1]


def test_each_coder_is_compared_with_ours() -> None:
    settings = list(coders())
    assert len({setting.coder for setting in settings}) == len(settings)
    ours = {(s.arch, s.kind) for s in settings if s.tool == "mptrain"}
    assert {(s.arch, s.kind) for s in settings if s.tool != "mptrain"} == ours - {
        ("mp", "skip-transcoder")
    }
    for setting in settings:
        (coder,) = fit_config(setting, "store", "run").coders()
        assert (coder.kind, coder.latents) == (setting.kind, 1024)
        assert coder.nested == (setting.arch == "matryoshka")


def test_words_choose_tools_and_architectures() -> None:
    settings = list(coders())
    assert chosen(settings, ()) == settings
    assert {s.tool for s in chosen(settings, ["sae-lens"])} == {"sae-lens"}
    assert [s.coder for s in chosen(settings, ["eai-sparsify", "sae"])] == ["eai-sparsify topk sae"]
    two = chosen(settings, ["sae-lens", "topk", "mp"])
    assert sorted(s.arch for s in two) == ["mp", "topk", "topk"]
    with pytest.raises(UsageError, match=r"only must be one of .*topk, got 'saelens'"):
        chosen(settings, ["saelens"])


def test_a_search_ends_with_a_worse_rate_on_each_side() -> None:
    trainings = CountedTrainings()
    best = best_of_search(TOPK, trainings)
    rates = sorted(s.lr or 0 for s in trainings.trained)
    assert rates == [3e-4, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    assert best.lr == 0.008


def test_the_default_rate_may_be_the_best() -> None:
    best = row(replace(TOPK, lr=3e-4), 0.1)
    assert best_of_search(TOPK, CountedTrainings([best])) == best


def test_what_the_table_has_is_not_trained_again() -> None:
    first = CountedTrainings()
    best = best_of_search(JUMPRELU, first)
    for count in (0, 1, 5, len(first.known)):
        second = CountedTrainings(first.known[:count])
        assert best_of_search(JUMPRELU, second) == best
        assert second.known == first.known
        assert len(second.trained) == len(first.known) - count


def test_seeds_and_long_runs_take_the_best_rate() -> None:
    trainings = CountedTrainings()
    best = best_of_search(TOPK, trainings)
    rows = with_all_seeds(best, trainings)
    assert [(r.seed, r.lr) for r in rows] == [(0, 0.008), (1, 0.008), (2, 0.008)]
    default, scaled = in_long_runs(best, trainings)
    assert (default.lr, default.steps, default.batch_rows) == (3e-4, 12_000, 112)
    rule = RULES["adam", "sae", "linear"]
    factor = 12**rule.steps * (112 / 256) ** rule.batch_rows
    assert scaled.lr == scaled_rate(0.008, best, default) == pytest.approx(0.008 * factor, rel=0.01)


@pytest.mark.parametrize("start", [1.0, 0.002, 400.0])
def test_the_penalty_is_searched_until_l0_is_k(start: float) -> None:
    known = [row(replace(JUMPRELU, lr=1.0, sparsity=start), 0.3)]
    trainings = CountedTrainings(known)
    assert at_k_latents(replace(JUMPRELU, lr=0.1), trainings).sparsity == pytest.approx(
        0.5, rel=0.05
    )
    assert trainings.trained[0].sparsity == start


def test_a_penalty_that_reaches_no_k_is_given_up_once() -> None:
    class Stuck(CountedTrainings):
        def train(self, setting: Setting) -> TrainingRow:
            trained = super().train(setting)
            self.known[-1] = replace(trained, l0=900.0 - (trained.sparsity or 0) / 1e9)
            return self.known[-1]

    trainings = Stuck()
    last = at_k_latents(JUMPRELU, trainings)
    assert len(trainings.trained) == 8
    assert last.sparsity == pytest.approx(4**7, rel=0.01)
    assert last.comparable_fvu == math.inf
    assert at_k_latents(JUMPRELU, trainings) == last
    assert len(trainings.trained) == 8


@pytest.mark.parametrize(("l0", "expected"), [
    ({}, 3.0),
    ({3.0: 40.0}, 12.0),
    ({3.0: 2.0}, 0.75),
    ({1.0: 64.0, 16.0: 4.0}, 4.0),
    ({1.0: 64.0, 16.0: 0.0}, 1.55),
])  # fmt: skip
def test_next_penalty(l0: dict[float, float], expected: float) -> None:
    assert next_sparsity(l0, 16, 3.0) == expected


def test_a_table_gives_back_its_rows(tmp_path: Path) -> None:
    table = tmp_path / "new" / "table.csv"
    rows = [
        row(replace(TOPK, lr=1 / 3), 0.25),
        row(replace(JUMPRELU, lr=3e-4, sparsity=0.1 + 0.2, normalise=True), math.inf, 0.0),
    ]
    assert read_table(table) == []
    for item in rows:
        append_rows(table, [item])
    assert read_table(table) == rows
    assert [path.name for path in table.parent.iterdir()] == ["table.csv"]


def test_report() -> None:
    best = replace(TOPK, lr=0.004)
    rows = [
        row(replace(TOPK, lr=3e-4), 0.5, rate="default"),
        row(best, 0.20),
        row(replace(best, seed=1), 0.22),
        row(replace(TOPK, lr=0.008), 0.3),
        row(replace(JUMPRELU, lr=3e-4, sparsity=1.0), 0.01, 900, rate="default"),
        row(replace(JUMPRELU, lr=3e-4, sparsity=9.0), 0.4, 18, rate="default"),
        row(replace(TOPK, steps=12_000, batch_rows=112, lr=3e-4), 0.15, rate="default"),
    ]
    short, long = markdown(rows).split("\n\n`")
    lines = short.splitlines()
    assert lines[0].startswith("`layers.3`, sae, 1024 latents, K = 16, 1,000 steps of 256 rows")
    assert lines[4:] == [
        "| jumprelu | sae-lens 1.2 | 0.0003 | 0.4100 | 18.0 ! | 0.25 "
        "| 0.0003 | 0.4100 | 18.0 ! | 0.25 | 1 | 4 |",
        "| topk | sae-lens 1.2 | 0.0003 | 0.5100 | 16.0 | 0.25 "
        "| 0.004 | 0.2200 ± 0.0141 | 16.0 | 0.25 | 2 | 4 |",
    ]
    assert "12,000 steps of 112 rows" in long
