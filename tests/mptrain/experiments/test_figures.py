"""Figures of an experiment: every line is drawn, differs from the others, and covers no text."""

import itertools
import math
import typing
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from mptrain.config.architectures import Arch
from mptrain.config.presets import PRESETS
from mptrain.experiments.drawing import RC_PARAMS
from mptrain.experiments.figures import (
    XQuantity,
    line_styles,
    save_sweep_figure,
    seed_means,
    sweep_figure,
)
from tests.helpers.experiments import tiny_experiment
from tests.helpers.trained import all_trained, trained

RED, BLUE, DARK_RED = "#c8202f", "#1f5fa8", "#7d0a14"
X_QUANTITIES = typing.get_args(XQuantity)
CAPTION = "A model on some text; 1,000 rows in batches of 10. " * 6
ALL = [n for n in PRESETS if n not in ("paper", "input-loss")] + ["batch-mp", "topk", "groupmax"]


def other_k(experiment):
    return {coder.name: {2: 0.7, 3: 0.5, 5: 0.4} for coder in experiment.coders}


def plan_styles(plan):
    return line_styles(line.variant for panel in plan.panels for line in panel.lines)


def test_red_blue_and_dark_red(tmp_path):
    styles = plan_styles(tiny_experiment(tmp_path).figures[0])
    assert [(style.color, style.dash) for style in styles.values()] == [
        (RED, "-"), (BLUE, "-"), (DARK_RED, "-")
    ]  # fmt: skip
    assert [style.label for style in styles.values()] == [
        "matching pursuit (MP)", "plain (TopK)", "batch MP, nested prefixes"
    ]  # fmt: skip


def test_many_lines_differ_in_color_and_style():
    from mptrain.experiments.spec import Variant

    variants = [Variant(f"v{n}", None, None, {"lr": 1.0 + n}) for n in range(28)]
    styles = line_styles(variants)
    assert len({(style.color, style.dash) for style in styles.values()}) == 28


def test_plain_lines_are_in_front(tmp_path):
    experiment = tiny_experiment(tmp_path, "figures.fvu.seeds=[0]")
    figure = sweep_figure(experiment.figures[0], all_trained(experiment), {}, "time", "")
    mp, topk, nested = figure.axes[0].lines
    assert mp.get_zorder() == topk.get_zorder() > nested.get_zorder()


def test_a_band_is_the_mean_and_the_spread_of_the_seeds(tmp_path):
    experiment = tiny_experiment(tmp_path)
    panel = experiment.panels[0]
    mp = panel.lines[0]
    curves = [trained(mp.coders[0], [0.8, 0.4]), trained(mp.coders[1], [0.6, 0.5], seconds=3.0)]
    coders = all_trained(experiment) | {coder.config.name: coder for coder in curves}
    red = seed_means(panel, coders, {}, "time", plan_styles(experiment.figures[0]))[0]
    assert red.x == (2.0, 4.0)
    assert (red.low, red.high) == ((0.6, 0.4), (0.8, 0.5))
    assert red.y == pytest.approx((0.7, 0.45))
    rows = seed_means(panel, coders, {}, "rows", plan_styles(experiment.figures[0]))[0]
    assert (rows.x, rows.y) == ((64.0, 128.0), red.y)


def test_fvu_at_other_k(tmp_path):
    experiment = tiny_experiment(tmp_path)
    plan = experiment.figures[0]
    red = seed_means(plan.panels[0], {}, other_k(experiment), "other-k", plan_styles(plan))[0]
    assert (red.x, red.y) == ((2.0, 3.0, 5.0), (0.7, 0.5, 0.4))


def test_a_curve_ends_where_it_diverges(tmp_path):
    experiment = tiny_experiment(tmp_path)
    plan, coders = experiment.figures[0], all_trained(experiment)
    for coder in plan.panels[0].lines[0].coders:
        coders[coder.name] = trained(coder, [0.8, math.nan], diverged=True)
    lines = seed_means(plan.panels[0], coders, {}, "time", plan_styles(plan))
    assert [len(line.x) for line in lines] == [1, 20, 20]
    for coder in plan.panels[0].lines[0].coders:
        coders[coder.name] = trained(coder, [math.nan], diverged=True)
    assert len(seed_means(plan.panels[0], coders, {}, "time", plan_styles(plan))) == 2
    sweep_figure(plan, coders, {}, "time", CAPTION)  # an empty line, or panel, is no reason to stop


@pytest.mark.parametrize("x_quantity", X_QUANTITIES)
def test_axes_are_named_with_their_unit(tmp_path, x_quantity):
    experiment = tiny_experiment(tmp_path)
    figure = sweep_figure(
        experiment.figures[0], all_trained(experiment), other_k(experiment), x_quantity, ""
    )
    names = {"time": "train time (s)", "rows": "rows trained on"}
    names["other-k"] = "K at evaluation (grey: in training)"
    assert {ax.get_xlabel() for ax in figure.axes} == {names[x_quantity]}
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
    with matplotlib.rc_context(RC_PARAMS):
        figure = sweep_figure(experiment.figures[0], all_trained(experiment), {}, "time", CAPTION)
        figure.draw_without_rendering()
    upper, lower = figure.subfigs
    figure_box = figure.bbox
    texts = [upper.legends[0], lower.texts[0], upper._suptitle]
    texts += [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    artists = [*texts, *(ax.patch for ax in figure.axes)]
    boxes = {f"{artist} {n}": artist.get_window_extent() for n, artist in enumerate(artists)}
    for (name, box), (other_name, other_box) in itertools.combinations(boxes.items(), 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (name, other_name)
    for name, box in boxes.items():
        assert figure_box.x0 <= box.x0 <= box.x1 <= figure_box.x1, name
        assert figure_box.y0 <= box.y0 <= box.y1 <= figure_box.y1, name
    assert figure.get_figwidth() <= 9.0


def test_the_same_figure_is_the_same_bytes(tmp_path):
    experiment = tiny_experiment(tmp_path, "figures.fvu.seeds=[0]")
    arguments = (experiment.figures[1], all_trained(experiment), {}, "time", CAPTION)
    png, svg = save_sweep_figure(*arguments, tmp_path / "one" / "time")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ET.fromstring(svg.read_bytes()).tag.endswith("svg")
    again = save_sweep_figure(*arguments, tmp_path / "two" / "time")
    assert [p.read_bytes() for p in again] == [png.read_bytes(), svg.read_bytes()]


def test_every_architecture_has_a_look(tmp_path):
    variants = list(typing.get_args(Arch))
    experiment = tiny_experiment(
        tmp_path, f"figures.fvu.variants={variants}", "figures.fvu.other_k=[]"
    )
    assert len({style.label for style in plan_styles(experiment.figures[0]).values()}) == len(
        variants
    )
