"""Figures of an experiment: FVU over train time, over rows, or over K at evaluation."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from mptrain.config.architectures import ARCHITECTURES
from mptrain.experiments.drawing import (
    DASHES,
    DrawnLine,
    DrawnPanel,
    LineStyle,
    XAxis,
    draw_panels,
    needs_log_axis,
    panel_title,
    save_figure,
    time_axis,
)
from mptrain.experiments.runs import validations
from mptrain.experiments.spec import FigurePlan, PanelPlan, Variant, VariantCoders
from mptrain.experiments.verdicts import CodersByName

XQuantity = Literal["time", "rows", "other-k"]
FvuByK = Mapping[str, Mapping[int, float]]  # FVU at each evaluated K, by the coder's name
Point = tuple[float, float]

# 28 distinct lines with the four dashes
COLORS = ("#d98b1e", "#3a9d8f", "#7a5195", "#5b8c2a", "#c45a9b", "#6f7f8f", "#8c6239")
_REFERENCES = ("mp", "topk")  # the plain coders that variants are compared with: thick lines
_SETTLED_SHARE = 0.15  # of a training: later FVUs set the range of the y axis


def save_sweep_figure(
    plan: FigurePlan,
    coders: CodersByName,
    fvu_by_k: FvuByK,
    x_quantity: XQuantity,
    caption: str,
    stem: Path,
) -> list[Path]:
    """Write a figure as `stem` with the endings png and svg; gives their paths."""
    return save_figure(sweep_figure(plan, coders, fvu_by_k, x_quantity, caption), stem)


def sweep_figure(
    plan: FigurePlan, coders: CodersByName, fvu_by_k: FvuByK, x_quantity: XQuantity, caption: str
) -> Figure:
    """The figure: a panel for each hookpoint and k, a line for each variant."""
    styles = line_styles(line.variant for panel in plan.panels for line in panel.lines)
    lines = [seed_means(panel, coders, fvu_by_k, x_quantity, styles) for panel in plan.panels]
    panels = [
        DrawnPanel(
            panel_title(panel.hookpoint, panel.kind, panel.k),
            tuple(panel_lines),
            _y_limits(panel_lines, x_quantity),
            float(panel.k) if x_quantity == "other-k" else None,
        )
        for panel, panel_lines in zip(plan.panels, lines, strict=True)
    ]
    return draw_panels(
        panels,
        list(styles.values()),
        _x_axis(lines, x_quantity),
        title=plan.settings.title or plan.name,
        y_label="FVU, held-out rows",
        is_log_y=needs_log_axis(*_y_limits(list(itertools.chain(*lines)), x_quantity)),
        caption=caption,
    )


def seed_means(
    panel: PanelPlan,
    coders: CodersByName,
    fvu_by_k: FvuByK,
    x_quantity: XQuantity,
    styles: Mapping[str, LineStyle],
) -> list[DrawnLine]:
    """The lines of a panel: mean, lowest and highest FVU over the seeds at each x.

    A variant without a point has no line.
    """
    lines = [
        _seed_mean(styles[line.variant.name], _points_by_seed(line, coders, fvu_by_k, x_quantity))
        for line in panel.lines
    ]
    return [line for line in lines if line.x]


def line_styles(variants: Iterable[Variant]) -> dict[str, LineStyle]:
    """The style of each variant by its name: the plain coders thick, in their own colors."""
    styles: dict[str, LineStyle] = {}
    unused = zip(itertools.cycle(COLORS), itertools.cycle(DASHES))
    for variant in variants:
        if variant.name in styles:
            continue
        architecture = ARCHITECTURES[variant.arch]
        if variant.is_plain and variant.arch in _REFERENCES:
            style = LineStyle(architecture.label, architecture.color, "-", 1.8)
        else:
            color, dash = (variant.color, "-") if variant.color else next(unused)
            name = architecture.label if variant.is_plain else variant.name.replace("-", " ")
            style = LineStyle(variant.label or name, color, dash, 1.3)
        styles[variant.name] = style
    return styles


def _points_by_seed(
    line: VariantCoders, coders: CodersByName, fvu_by_k: FvuByK, x_quantity: XQuantity
) -> list[dict[int, Point]]:
    """For each seed, (x, FVU) by train step, or by K."""
    if x_quantity == "other-k":
        evaluated = (fvu_by_k.get(coder.name, {}) for coder in line.coders)
        return [
            {k: (float(k), fvu) for k, fvu in fvus.items() if math.isfinite(fvu)}
            for fvus in evaluated
        ]
    curves = (validations(coders[c.name]) for c in line.coders if c.name in coders)
    return [
        {
            record.step: (
                record.train_seconds if x_quantity == "time" else float(record.rows),
                float(record.validation_fvu or 0),
            )
            for record in curve
        }
        for curve in curves
    ]


def _seed_mean(style: LineStyle, seeds: Sequence[Mapping[int, Point]]) -> DrawnLine:
    keys = sorted({key for points in seeds for key in points})
    by_key = [[points[key] for points in seeds if key in points] for key in keys]
    fvus = [[fvu for _, fvu in points] for points in by_key]
    return DrawnLine(
        style,
        x=tuple(sum(x for x, _ in points) / len(points) for points in by_key),
        y=tuple(sum(values) / len(values) for values in fvus),
        low=tuple(map(min, fvus)),
        high=tuple(map(max, fvus)),
    )


def _x_axis(panels: Sequence[Sequence[DrawnLine]], x_quantity: XQuantity) -> XAxis:
    if x_quantity == "rows":
        return XAxis("rows trained on", has_prefixes=True)
    if x_quantity == "other-k":
        return XAxis("K at evaluation (grey: in training)", is_log2=True)
    longest = max((x for lines in panels for line in lines for x in line.x), default=0.0)
    return time_axis("train time", longest)


def _y_limits(lines: Sequence[DrawnLine], x_quantity: XQuantity) -> tuple[float, float]:
    """Lowest and highest FVU to show.

    The start of a training, and FVUs over 1, may lie above: they would flatten all the rest.
    """
    if not lines:
        return 0.0, 1.0
    share = 0.0 if x_quantity == "other-k" else _SETTLED_SHARE
    settled = [
        fvu
        for line in lines
        for x, fvu in zip(line.x, line.high, strict=True)
        if x >= share * line.x[-1]
    ]
    low, high = min(min(line.low) for line in lines), max(settled)
    if low < 1 < high:
        high = 1.0
    margin = 0.04 * (high - low) or 0.01
    return max(low - margin, 0.9 * low), high + margin
