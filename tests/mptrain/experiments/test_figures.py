"""Figures of an experiment: every line is there, can be told from others, and covers nothing."""

import itertools
import math
import typing
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from mptrain.config.architectures import Arch
from mptrain.config.presets import PRESETS
from mptrain.experiments.figures import Axis, bands, draw, draw_figure, looks_of
from mptrain.experiments.plot_runs import RC
from tests.helpers.experiments import tiny_experiment
from tests.helpers.trained import all_trained, trained

RED, BLUE, DARK_RED = "#c8202f", "#1f5fa8", "#7d0a14"
AXES = typing.get_args(Axis)
CAPTION = "A model on some text; 1,000 rows in batches of 10. " * 6
ALL = [n for n in PRESETS if n not in ("paper", "input-loss")] + ["batch-mp", "topk", "groupmax"]


def other_k(experiment):
    return {coder.name: {2: 0.7, 3: 0.5, 5: 0.4} for coder in experiment.coders}


def looks(plan):
    return looks_of(line.variant for panel in plan.panels for line in panel.lines)


def test_red_blue_and_dark_red(tmp_path):
    found = looks(tiny_experiment(tmp_path).figures[0])
    assert [(look.color, look.style) for look in found.values()] == [
        (RED, "-"), (BLUE, "-"), (DARK_RED, "-")
    ]  # fmt: skip
    assert [look.label for look in found.values()] == [
        "matching pursuit (MP)", "plain (TopK)", "batch MP, nested prefixes"
    ]  # fmt: skip


def test_many_lines_differ_in_color_and_style():
    from mptrain.experiments.spec import Variant

    variants = [Variant(f"v{n}", None, None, {"lr": 1.0 + n}) for n in range(28)]
    found = looks_of(variants)
    assert len({(look.color, look.style) for look in found.values()}) == 28


def test_plain_lines_are_in_front(tmp_path):
    experiment = tiny_experiment(tmp_path, "figures.fvu.seeds=[0]")
    figure = draw(experiment.figures[0], all_trained(experiment), {}, "time", "")
    mp, topk, nested = figure.axes[0].lines
    assert mp.get_zorder() == topk.get_zorder() > nested.get_zorder()


def test_a_band_is_the_mean_and_the_spread_of_the_seeds(tmp_path):
    experiment = tiny_experiment(tmp_path)
    panel = experiment.panels[0]
    mp = panel.lines[0]
    curves = [trained(mp.coders[0], [0.8, 0.4]), trained(mp.coders[1], [0.6, 0.5], seconds=3.0)]
    coders = all_trained(experiment) | {one.config.name: one for one in curves}
    red = bands(panel, coders, {}, "time", looks(experiment.figures[0]))[0]
    assert red.x == (2.0, 4.0)
    assert (red.low, red.high) == ((0.6, 0.4), (0.8, 0.5))
    assert red.mean == pytest.approx((0.7, 0.45))
    rows = bands(panel, coders, {}, "rows", looks(experiment.figures[0]))[0]
    assert (rows.x, rows.mean) == ((64.0, 128.0), red.mean)


def test_fvu_at_other_k(tmp_path):
    experiment = tiny_experiment(tmp_path)
    plan = experiment.figures[0]
    red = bands(plan.panels[0], {}, other_k(experiment), "other-k", looks(plan))[0]
    assert (red.x, red.mean) == ((2.0, 3.0, 5.0), (0.7, 0.5, 0.4))


def test_a_curve_ends_where_it_diverges(tmp_path):
    experiment = tiny_experiment(tmp_path)
    plan, coders = experiment.figures[0], all_trained(experiment)
    for coder in plan.panels[0].lines[0].coders:
        coders[coder.name] = trained(coder, [0.8, math.nan], diverged=True)
    found = bands(plan.panels[0], coders, {}, "time", looks(plan))
    assert [len(band.x) for band in found] == [1, 20, 20]
    for coder in plan.panels[0].lines[0].coders:
        coders[coder.name] = trained(coder, [math.nan], diverged=True)
    assert len(bands(plan.panels[0], coders, {}, "time", looks(plan))) == 2
    draw(plan, coders, {}, "time", CAPTION)  # an empty line, or panel, is no reason to stop


@pytest.mark.parametrize("axis", AXES)
def test_axes_are_named_with_their_unit(tmp_path, axis):
    experiment = tiny_experiment(tmp_path)
    figure = draw(experiment.figures[0], all_trained(experiment), other_k(experiment), axis, "")
    names = {"time": "train time (s)", "rows": "rows trained on"}
    names["other-k"] = "K at evaluation (grey: in training)"
    assert {ax.get_xlabel() for ax in figure.axes} == {names[axis]}
    assert figure.axes[0].get_ylabel() == "FVU, held-out rows"
    assert [ax.get_title() for ax in figure.axes] == [
        "layers.0\nSAE, k = 3", "layers.1.mlp\nSAE, k = 3"
    ]  # fmt: skip


@pytest.mark.parametrize(("panels", "lines"), [(1, 3), (2, 18), (3, 18), (4, 3), (12, 3)])
def test_nothing_overlaps(tmp_path, panels, lines):
    """Titles, labels, legend and caption, as rendered."""
    changes = [
        f"figures.fvu.hookpoints={[f'layers.{n}.mlp' for n in range(panels)]}",
        "figures.fvu.kind=skip-transcoder",
        f"figures.fvu.variants={ALL[:lines]}",
        "figures.fvu.seeds=[0]",
        "figures.fvu.other_k=[]",
    ]
    experiment = tiny_experiment(tmp_path, *changes)
    with matplotlib.rc_context(RC):
        figure = draw(experiment.figures[0], all_trained(experiment), {}, "time", CAPTION)
        figure.draw_without_rendering()
    upper, lower = figure.subfigs
    whole = figure.bbox
    texts = [upper.legends[0], lower.texts[0], upper._suptitle]
    texts += [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    found = [*texts, *(ax.patch for ax in figure.axes)]
    boxes = {f"{one} {n}": one.get_window_extent() for n, one in enumerate(found)}
    for (one, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (one, other)
    for one, box in boxes.items():
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, one
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, one
    assert figure.get_figwidth() <= 9.0


def test_the_same_figure_is_the_same_bytes(tmp_path):
    experiment = tiny_experiment(tmp_path, "figures.fvu.seeds=[0]")
    arguments = (experiment.figures[1], all_trained(experiment), {}, "time", CAPTION)
    png, svg = draw_figure(*arguments, tmp_path / "one" / "time")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ET.fromstring(svg.read_bytes()).tag.endswith("svg")
    again = draw_figure(*arguments, tmp_path / "two" / "time")
    assert [p.read_bytes() for p in again] == [png.read_bytes(), svg.read_bytes()]


def test_every_architecture_has_a_look(tmp_path):
    variants = list(typing.get_args(Arch))
    experiment = tiny_experiment(tmp_path, f"figures.fvu.variants={variants}")
    assert len({look.label for look in looks(experiment.figures[0]).values()}) == len(variants)
