"""The slopes of FVU over rows, and the validations that they need."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mpcli.mptrain import app as mptrain
from mptrain.runs.convergence import (
    FALLING_ABOVE,
    Convergence,
    convergence_of,
    describe_convergence,
    validation_steps,
)
from mptrain.runs.fit import fit
from mptrain.runs.metrics_file import Record, read_records
from mptrain.runs.results import CoderResult
from mptrain.training.learning_rate import rule_of
from mptrain.training.setup import CoderRun
from tests.helpers.fits import config, interrupt_at, spoil
from tests.helpers.records import RECORD
from tests.helpers.stores import small_store

EXPONENTS = st.floats(-2, 0.5)
EXPONENT = -0.5  # of the rate over the steps
SCALES = st.floats(1e-3, 10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("fit"))[0])


def records(*points: tuple[int, float | None]) -> list[Record]:
    return [dataclasses.replace(RECORD, rows=rows, validation_fvu=fvu) for rows, fvu in points]


def power_law(scale: float, exponent: float, rows: range) -> list[Record]:
    return records(*((n, scale * n**exponent) for n in rows))


def known(convergence: Convergence | None) -> Convergence:
    assert convergence is not None
    return convergence


@given(SCALES, EXPONENTS, st.integers(1, 1000), st.integers(10, 40))
def test_a_power_law_gives_its_exponent(
    scale: float, exponent: float, every: int, validations: int
) -> None:
    """signsgd has the same rate for every length: its gain is that of the power law itself."""
    rows = range(every, every * validations + 1, every)
    convergence = known(convergence_of(power_law(scale, exponent, rows), 0.0))
    assert (convergence.slope, convergence.middle_slope) == pytest.approx(
        (exponent, exponent), abs=1e-6
    )
    ratio = (2 * rows[-1]) ** exponent / rows[-1] ** exponent
    assert convergence.gain_of_doubling == pytest.approx(1 - ratio, abs=1e-6)


@pytest.mark.parametrize("exponent", [-0.3, -0.6])
def test_a_lower_rate_for_a_longer_run_gains_less(exponent: float) -> None:
    curve = power_law(1.0, -0.5, range(1, 21))
    gain = known(convergence_of(curve, exponent)).gain_of_doubling
    assert gain == pytest.approx(1 - 2 ** (-0.5 * (1 + exponent)))
    assert 0 < gain < known(convergence_of(curve, 0.0)).gain_of_doubling


@given(SCALES)
def test_a_constant_curve_gains_nothing(fvu: float) -> None:
    convergence = known(convergence_of(records(*((n, fvu) for n in range(1, 21))), EXPONENT))
    assert convergence.slope == pytest.approx(0, abs=1e-12)
    assert convergence.gain_of_doubling == pytest.approx(0, abs=1e-12)
    assert not convergence.still_falling


@pytest.mark.parametrize("sign", [-1, 1])
def test_falling_is_a_gain_over_the_threshold(sign: int) -> None:
    exponent = math.log2(1 - FALLING_ABOVE) * (1 - sign * 1e-3)
    convergence = known(convergence_of(power_law(1.0, exponent, range(1, 21)), 0.0))
    assert convergence.still_falling == (sign < 0)


@given(st.lists(st.floats(0.01, 10), min_size=60, max_size=60), SCALES)
def test_only_the_shape_of_the_two_stretches_counts(others: list[float], scale: float) -> None:
    """Other FVUs around them, another unit of rows and a factor of FVU change nothing."""
    curve = {n: 0.5 / n + 0.1 for n in range(1, 101)}
    outside = [n for n in curve if n < 20 or 60 < n < 80]
    changed = curve | dict(zip(outside, others, strict=False))
    plain = known(convergence_of(records(*changed.items()), EXPONENT))
    scaled = records(*((64 * n, scale * fvu) for n, fvu in curve.items()))
    assert dataclasses.astuple(known(convergence_of(scaled, EXPONENT))) == pytest.approx(
        dataclasses.astuple(plain), abs=1e-9
    )


def test_a_fall_at_the_end_is_in_the_slope_and_not_in_the_gain() -> None:
    """It is the work of a learning rate that falls to 0, which a longer run has once, too."""
    even = power_law(1.0, -0.1, range(1, 101))
    falling = [
        dataclasses.replace(r, validation_fvu=(r.validation_fvu or 0) * min(1, 80 / r.rows))
        for r in even
    ]
    plain, steep = known(convergence_of(even, EXPONENT)), known(convergence_of(falling, EXPONENT))
    assert steep.slope == pytest.approx(-1.1)
    assert steep.gain_of_doubling == plain.gain_of_doubling


def test_train_steps_without_validation_are_skipped() -> None:
    validated = [(n, 1 / n) for n in range(2, 41, 2)]
    others = [(n, None) for n in range(1, 60, 2)]
    mixed: list[tuple[int, float | None]] = sorted([*validated, *others])
    assert convergence_of(records(*mixed), EXPONENT) == convergence_of(
        records(*validated), EXPONENT
    )


MIDDLE_POINTS = ((20, 0.8), (40, 0.7), (60, 0.6))
END_POINTS = ((80, 0.5), (90, 0.4), (100, 0.3))


def test_three_validations_in_each_stretch_are_enough() -> None:
    assert convergence_of(records(*MIDDLE_POINTS, *END_POINTS), EXPONENT) is not None


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((10, 0.5),),
        (*MIDDLE_POINTS, (79, 0.5), (90, 0.4), (100, 0.3)),  # two in the last fifth
        ((19, 0.9), (40, 0.7), (60, 0.6), *END_POINTS),  # two in the middle
        (*MIDDLE_POINTS, *END_POINTS[:2], (95, 0.4), (100, math.nan)),  # diverged
        (*MIDDLE_POINTS, *END_POINTS[:2], (100, 0.0)),  # no logarithm
    ],
)
def test_without_three_usable_validations_there_is_no_slope(
    points: tuple[tuple[int, float], ...],
) -> None:
    assert convergence_of(records(*points), EXPONENT) is None


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_run_is_validated_often_enough_for_its_slopes(steps: int, every: int) -> None:
    validated = validation_steps(steps, every)
    regular = {*range(every, steps + 1, every), steps}
    assert regular <= set(validated) <= {*range(1, steps + 1)}
    assert validated == sorted(set(validated))
    assert len(validated) <= len(regular) + 5
    curve = records(*((64 * step, 1 / step) for step in validated))
    assert (convergence_of(curve, EXPONENT) is not None) or steps < 10
    if convergence_of(records(*((step, 1 / step) for step in sorted(regular))), EXPONENT):
        assert regular == set(validated)


def test_a_sentence_names_the_range_of_gains() -> None:
    falling, other, still = (
        convergence_of(power_law(1.0, exponent, range(1, 21)), 0.0)
        for exponent in (-0.5, -0.1, -0.001)
    )
    assert describe_convergence([None]) is None
    assert (
        "Still falling: 2 of 3 coders; twice the rows would lower FVU by about 6.7 to 29 %"
        in str(describe_convergence([falling, None, other, still]))
    )
    assert "None of the 1 coders with enough validations was still falling" in str(
        describe_convergence([still, None])
    )


def test_results_have_the_slope_of_the_curve_also_after_an_interruption(
    store: str, tmp_path: Path
) -> None:
    """The final evaluation, on all held-out rows, is no point of the curve."""
    some_rows = {"kind": ("sae",), "eval_rows": 64}
    whole = fit(config(store, tmp_path / "whole", **some_rows))
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "broken", **some_rows), on_step=interrupt_at(23))
    broken = fit(config(store, tmp_path / "broken", **some_rows))
    assert [result.convergence for result in broken] == [result.convergence for result in whole]
    lines = read_records(tmp_path / "whole/metrics.jsonl")
    configs = config(store, tmp_path / "whole", **some_rows).coders()
    coders = {coder.name: coder for coder in configs}
    stored = json.loads((tmp_path / "whole/results.json").read_text())
    for result, entry in zip(whole, stored, strict=True):
        own = [line for line in lines if line.coder == result.coder]
        exponent = rule_of(coders[result.coder]).steps
        assert known(result.convergence) == known(convergence_of(own, exponent))
        assert entry["convergence"] == dataclasses.asdict(known(result.convergence))
        assert CoderResult.from_json(entry) == CoderResult.from_json(result.to_json())
        description = json.loads(
            (tmp_path / "whole/coders" / result.coder / "coder.json").read_text()
        )
        assert description["trained"]["convergence"] == entry["convergence"]


def test_results_of_an_earlier_version_are_read(store: str, tmp_path: Path) -> None:
    (result, _) = fit(config(store, tmp_path / "run", kind=("sae",)))
    entry = result.to_json()
    del entry["convergence"]
    assert CoderResult.from_json(entry) == dataclasses.replace(
        CoderResult.from_json(result.to_json()), convergence=None
    )


def test_a_diverged_coder_has_no_slope(store: str, tmp_path: Path) -> None:
    def on_step(step: int, coder_runs: Sequence[CoderRun]) -> None:
        if step == 24:
            spoil(coder_runs[0])

    ill, well = fit(config(store, tmp_path / "run", kind=("sae",), eval_every=1), on_step=on_step)
    assert ill.diverged
    assert ill.convergence is None
    assert well.convergence is not None


def test_the_table_of_a_run_says_what_twice_the_rows_would_gain(store: str, tmp_path: Path) -> None:
    arguments = ["fit", store, "--run", str(tmp_path / "run"), "--hookpoints", "layers.1.mlp",
             "--k", "3", "--expansion", "2", "--rows", "1536", "--batch-rows", "64"]  # fmt: skip
    completed = CliRunner().invoke(mptrain, arguments)
    assert completed.exit_code == 0, completed.stderr
    head, *_ = completed.stdout.splitlines()
    assert head.split()[-1] == "gain_of_doubling"
    assert "extrapolated from the middle of the run" in completed.stdout
