"""Verdicts on invented curves, computed by hand."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from mptrain.experiments.verdicts import find_problems, panel_verdicts
from mptrain.training.learning_rate import rule_of
from tests.helpers.experiments import tiny_experiment
from tests.helpers.trained import trained

ONLY = "figures.fvu.variants=['topk', 'mp', 'nested']"


@pytest.fixture
def panel(tmp_path):
    return tiny_experiment(tmp_path, ONLY).panels[0]


def coders_of(panel, **curves):
    """`variant=(curve of each seed)`; a curve is FVUs and seconds of a step."""
    return {
        coder.name: trained(coder, fvus, seconds=seconds)
        for line in panel.lines
        for coder, (fvus, seconds) in zip(line.coders, curves[line.variant.name], strict=True)
    }


def saved(coders, folder):
    """The same coders with weights, all of them different."""
    for number, name in enumerate(coders):
        (folder / "coders" / name).mkdir(parents=True)
        weights = {"W_MD": torch.tensor([1.0, number]), f"only_{number}": torch.zeros(1)}
        save_file(weights, folder / "coders" / name / "coder.safetensors")
    return {name: dataclasses.replace(coder, folder=folder) for name, coder in coders.items()}


def test_a_verdict_is_of_all_seeds(panel):
    coders = coders_of(
        panel,
        topk=(([0.8, 0.5], 1.0), ([0.8, 0.7], 3.0)),  # ends at .6 after 4 s on average
        mp=(([0.9, 0.55, 0.4], 2.0), ([0.7, 0.5, 0.3], 2.0)),
        nested=(([0.9, 0.8], 2.0), ([0.9, 0.59], 2.0)),
    )
    topk, mp, nested = panel_verdicts(panel, coders)
    assert (topk.fvu, topk.fvu_low, topk.fvu_high) == pytest.approx((0.6, 0.5, 0.7))
    assert topk.train_seconds == 4.0
    assert (topk.seeds_below_plain, topk.fvu_at_plain_seconds) == (None, None)
    assert mp.fvu == pytest.approx(0.35)
    assert mp.below_plain_after_seconds == 4.0
    assert mp.seeds_below_plain == 2
    assert mp.fvu_at_plain_seconds == pytest.approx((0.55 + 0.5) / 2)
    assert (nested.seeds_below_plain, nested.below_plain_after_seconds) == (1, 4.0)


def test_fvu_at_the_plain_coders_time_lies_between_validations(panel):
    coders = coders_of(
        panel,
        topk=(([0.8, 0.5], 1.5), ([0.8, 0.5], 1.5)),  # 3 s
        mp=(([0.9, 0.5, 0.4], 2.0), ([0.9, 0.5], 1.0)),  # at 3 s .7, and its end
        nested=(([0.9, 0.8], 9.0), ([0.9, 0.8], 9.0)),  # its first one
    )
    _, mp, nested = panel_verdicts(panel, coders)
    assert mp.fvu_at_plain_seconds == pytest.approx((0.7 + 0.5) / 2)
    assert nested.fvu_at_plain_seconds == pytest.approx(0.9)
    assert (nested.seeds_below_plain, nested.below_plain_after_seconds) == (0, None)


def test_a_verdict_says_from_which_share_on_a_line_is_ahead(panel):
    """Each seed beside the plain coder of its seed; the mean is of the seeds that get ahead."""
    coders = coders_of(
        panel,
        topk=(([0.8, 0.6, 0.5, 0.4], 1.0), ([0.7, 0.6, 0.5, 0.3], 1.0)),
        mp=(([0.9, 0.5, 0.4, 0.3], 2.0), ([0.6, 0.5, 0.4, 0.2], 2.0)),  # from 1/2, from the start
        nested=(([0.9, 0.7, 0.6, 0.5], 1.0), ([0.9, 0.8, 0.4, 0.2], 1.0)),  # never, from 3/4
    )
    topk, mp, nested = panel_verdicts(panel, coders)
    assert (topk.seeds_ahead_by_rows, topk.ahead_from_rows_share) == (None, None)
    assert (mp.seeds_ahead_by_rows, mp.ahead_from_rows_share) == (2, 0.25)
    # after 4 s TopK has its last FVU: seed 0 passes below .4 after 8 s, seed 1 below .3 too
    assert (mp.seeds_ahead_by_seconds, mp.ahead_from_seconds_share) == (2, 1.0)
    assert (nested.seeds_ahead_by_rows, nested.ahead_from_rows_share) == (1, 0.75)
    assert (nested.seeds_ahead_by_seconds, nested.ahead_from_seconds_share) == (1, 0.75)


def test_a_verdict_has_the_mean_slope_of_its_seeds(panel):
    power, flat = [step**-0.5 for step in range(1, 21)], [0.5] * 20
    coders = coders_of(
        panel,
        topk=((power, 1.0), (flat, 1.0)),
        mp=((flat, 1.0), (flat, 1.0)),
        nested=((power[:5], 1.0), (power[:5], 1.0)),  # too few validations
    )
    topk, mp, nested = panel_verdicts(panel, coders)
    assert topk.slope == pytest.approx(-0.25)
    assert topk.gain_of_doubling == pytest.approx(
        (1 - 2 ** (-0.5 * (1 + rule_of(panel.lines[0].coders[0]).steps))) / 2
    )
    assert [verdict.seeds_still_falling for verdict in (topk, mp, nested)] == [1, 0, None]
    assert (nested.slope, nested.gain_of_doubling) == (None, None)


def test_diverged_seeds_are_counted_and_left_out(panel, tmp_path):
    curves = {"topk": [([0.5], 1.0)] * 2, "mp": [([0.4], 1.0)] * 2, "nested": [([0.3], 1.0)] * 2}
    coders = saved(coders_of(panel, **curves), tmp_path)
    lost = panel.lines[1].coders[1]
    coders[lost.name] = trained(lost, [0.6, math.nan], diverged=True)
    _, mp, _ = panel_verdicts(panel, coders)
    assert (mp.seeds, mp.diverged, mp.fvu) == (2, 1, 0.4)
    assert find_problems([panel], coders) == []  # its curve ends early, but exists


def test_a_line_without_a_point_is_a_fault(panel, tmp_path):
    curves = {"topk": [([0.5], 1.0)] * 2, "mp": [([0.4], 1.0)] * 2, "nested": [([0.3], 1.0)] * 2}
    coders = saved(coders_of(panel, **curves), tmp_path)
    assert find_problems([panel], coders) == []
    nested = panel.lines[2].coders[1]
    coders[nested.name] = trained(nested, [math.nan], diverged=True)
    (problem,) = find_problems([panel], coders)
    assert "fvu/layers.0-sae-k3 has no curve of nested, seed 1" in problem
    del coders[nested.name]
    assert find_problems([panel], coders) == [problem]


def test_equal_metrics_are_a_fault_one_bit_is_none(panel, tmp_path):
    curves = {"topk": [([0.5], 1.0)] * 2, "mp": [([0.4], 1.0)] * 2, "nested": [([0.4], 2.0)] * 2}
    coders = saved(coders_of(panel, **curves), tmp_path)
    (problem,) = find_problems([panel], coders)
    assert "nested gives exactly the same results as plain MP" in problem
    for coder in panel.lines[2].coders:
        trained_coder = coders[coder.name]
        changed = dataclasses.replace(trained_coder.records[0], fvu=math.nextafter(0.4, 1))
        coders[coder.name] = dataclasses.replace(trained_coder, records=(changed,))
    assert find_problems([panel], coders) == []


def test_equal_weights_are_a_fault(panel, tmp_path):
    curves = {"topk": [([0.5], 1.0)] * 2, "mp": [([0.4], 1.0)] * 2, "nested": [([0.3], 1.0)] * 2}
    coders = saved(coders_of(panel, **curves), tmp_path)
    _, mp, nested = (line.coders[1].name for line in panel.lines)
    weights = {"W_MD": load_file(tmp_path / "coders" / mp / "coder.safetensors")["W_MD"]}
    more = {"separate": torch.ones(1)}  # of its own
    save_file(weights | more, tmp_path / "coders" / nested / "coder.safetensors")
    assert [problem.partition(", so its")[0] for problem in find_problems([panel], coders)] == [
        "fvu/layers.0-sae-k3: nested gives exactly the same results as plain MP"
    ]
