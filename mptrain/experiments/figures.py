"""Figures of an experiment: FVU over train time, over rows, and at other K; a panel each."""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator

from mptrain.config.architectures import ARCHITECTURES
from mptrain.data.atomic_files import explain_write_errors
from mptrain.experiments.plot_runs import (
    DPI,
    LOG_FROM,
    PANEL_INCHES,
    RC,
    STYLES,
    log_y,
    time_unit,
)
from mptrain.experiments.spec import FigurePlan, Line, Panel, Variant
from mptrain.experiments.verdicts import Coders, validations
from mptrain.runs.metrics import Record

Axis = Literal["time", "rows", "other-k"]
OtherK = Mapping[str, Mapping[int, float]]  # FVU at other K, by the coder's name

# with the four styles, 28 lines that differ
COLORS = ("#d98b1e", "#3a9d8f", "#7a5195", "#5b8c2a", "#c45a9b", "#6f7f8f", "#8c6239")
_MANY = 6  # lines in a panel that call for a higher one
_SETTLED = 0.15  # share of a training after which its FVU sets the range of the axis


@dataclass(frozen=True)
class Look:
    """How a variant is drawn."""

    label: str
    color: str
    style: str
    width: float

    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": self.style, "linewidth": self.width}


@dataclass(frozen=True)
class Band:
    """A line of a panel: mean, lowest and highest FVU over the seeds at each x."""

    look: Look
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def draw_figure(
    plan: FigurePlan, coders: Coders, other_k: OtherK, axis: Axis, caption: str, stem: Path
) -> list[Path]:
    """Write a figure as `stem` with the endings png and svg; gives their paths."""
    paths = [stem.with_name(f"{stem.name}.{end}") for end in ("png", "svg")]
    with explain_write_errors(stem.parent), matplotlib.rc_context(RC):
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(plan, coders, other_k, axis, caption)
        figure.savefig(paths[0], dpi=DPI)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw(plan: FigurePlan, coders: Coders, other_k: OtherK, axis: Axis, caption: str) -> Figure:
    """The figure; its caption stands below it."""
    looks = looks_of(line.variant for panel in plan.panels for line in panel.lines)
    drawn = [bands(panel, coders, other_k, axis, looks) for panel in plan.panels]
    columns = 2 if len(drawn) == 4 else min(3, len(drawn))
    figure, upper, axes = _empty(len(drawn), columns, len(looks), caption)
    unit, scale = _unit(drawn, axis)
    low, high = _range([band for panel in drawn for band in panel], axis)
    for ax, panel, lines in zip(axes, plan.panels, drawn, strict=True):
        _draw_panel(ax, panel, lines, scale, axis)
        ax.set_ylim(*_range(lines, axis))
        if low > 0 and high / low >= LOG_FROM:
            log_y(ax)
    for ax in axes[-columns:]:  # the lowest of each column
        ax.set_xlabel(unit)
    for ax in axes[::columns]:
        ax.set_ylabel("FVU, held-out rows")
    upper.suptitle(plan.table.title or plan.name, fontsize=11)
    handles = [Line2D([], [], label=look.label, **look.line()) for look in looks.values()]
    upper.legend(
        handles=handles, loc="outside lower center", ncols=_legend_columns(columns), frameon=False
    )
    return figure


def bands(
    panel: Panel, coders: Coders, other_k: OtherK, axis: Axis, looks: Mapping[str, Look]
) -> list[Band]:
    """The lines of a panel; none for a variant without a point."""
    found = [
        _band(looks[line.variant.name], _points(line, coders, other_k, axis))
        for line in panel.lines
    ]
    return [band for band in found if band.x]


def looks_of(variants: Iterable[Variant]) -> dict[str, Look]:
    """The look of each variant by its name: plain MP red, the plain coder blue, both solid."""
    looks: dict[str, Look] = {}
    marks = zip(itertools.cycle(COLORS), itertools.cycle(STYLES))
    for variant in variants:
        if variant.name in looks:
            continue
        if variant.is_plain and variant.arch in ("mp", "topk"):
            plain = ARCHITECTURES[variant.arch]
            look = Look(plain.label, plain.color, "-", 1.8)
        else:
            color, style = (variant.color, "-") if variant.color else next(marks)
            look = Look(variant.label or _spoken(variant), color, style, 1.3)
        looks[variant.name] = look
    return looks


def _spoken(variant: Variant) -> str:
    return ARCHITECTURES[variant.arch].label if variant.is_plain else variant.name.replace("-", " ")


def _points(
    line: Line, coders: Coders, other_k: OtherK, axis: Axis
) -> list[dict[int, tuple[float, float]]]:
    """Of each seed: (x, FVU) by train step, or by K."""
    if axis == "other-k":
        found = (other_k.get(coder.name, {}) for coder in line.coders)
        return [
            {k: (float(k), fvu) for k, fvu in one.items() if math.isfinite(fvu)} for one in found
        ]
    x_of: Callable[[Record], float] = _seconds if axis == "time" else _rows
    curves = (validations(coders[c.name]) for c in line.coders if c.name in coders)
    return [{r.step: (x_of(r), float(r.validation_fvu or 0)) for r in curve} for curve in curves]


def _seconds(record: Record) -> float:
    return record.train_seconds


def _rows(record: Record) -> float:
    return float(record.rows)


def _band(look: Look, seeds: Sequence[Mapping[int, tuple[float, float]]]) -> Band:
    keys = sorted({key for one in seeds for key in one})
    points = [[one[key] for one in seeds if key in one] for key in keys]
    fvus = [[fvu for _, fvu in of_key] for of_key in points]
    return Band(
        look,
        tuple(sum(x for x, _ in of_key) / len(of_key) for of_key in points),
        tuple(sum(of_key) / len(of_key) for of_key in fvus),
        tuple(map(min, fvus)),
        tuple(map(max, fvus)),
    )


def _draw_panel(ax: Axes, panel: Panel, lines: Sequence[Band], scale: float, axis: Axis) -> None:
    for band in lines:
        x = [value / scale for value in band.x]
        few = len(x) < 10 or axis == "other-k"  # a single point would not show otherwise
        in_front = 2 + band.look.width  # the thick lines, which the others are compared with
        ax.plot(x, band.mean, marker="." if few else "", zorder=in_front, **band.look.line())
        ax.fill_between(x, band.low, band.high, color=band.look.color, alpha=0.2, linewidth=0)
    ax.set_title(f"{panel.hookpoint}\n{panel.kind.replace('sae', 'SAE')}, k = {panel.k}")
    if axis == "other-k":
        _k_axis(ax, panel, lines)
    else:
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    if axis == "rows":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _k_axis(ax: Axes, panel: Panel, lines: Sequence[Band]) -> None:
    ax.axvline(panel.k, color="#9a9a9a", linewidth=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({x for band in lines for x in band.x}))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _unit(drawn: Sequence[Sequence[Band]], axis: Axis) -> tuple[str, float]:
    """The label of the x axis, and by what its values are divided."""
    if axis == "rows":
        return "rows trained on", 1.0
    if axis == "other-k":
        return "K at evaluation (grey: in training)", 1.0
    longest = max((x for lines in drawn for band in lines for x in band.x), default=0.0)
    unit, seconds = time_unit(longest)
    return f"train time ({unit})", seconds


def _range(lines: Sequence[Band], axis: Axis) -> tuple[float, float]:
    """Lowest and highest FVU to show: the start of a training, and what is over 1, may leave it."""
    if not lines:
        return 0.0, 1.0
    share = 0.0 if axis == "other-k" else _SETTLED
    settled = [
        fvu
        for band in lines
        for x, fvu in zip(band.x, band.high, strict=True)
        if x >= share * band.x[-1]
    ]
    low = min(min(band.low) for band in lines)
    high = max(settled)
    if low < 1 < high:
        high = 1.0
    edge = 0.04 * (high - low) or 0.01
    return max(low - edge, 0.9 * low), high + edge


def _empty(
    panels: int, columns: int, labels: int, caption: str
) -> tuple[Figure, SubFigure, list[Axes]]:
    """A figure, its part above the caption, the axes; as wide as a README (900 px at 100 dpi)."""
    rows, width = -(-panels // columns), max(2, columns) * PANEL_INCHES
    height = (1.15 if labels > _MANY else 0.78) * PANEL_INCHES
    legend = 0.19 * -(-labels // _legend_columns(columns))
    told = textwrap.fill(caption, int(width * 17))
    heights = (rows * height + legend + 0.6, 0.14 * (told.count("\n") + 1) + 0.08)
    figure = Figure((width, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flatten()
    axes = upper.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes[panels:]:
        ax.remove()
    lower.text(0.01, 1, told, va="top", fontsize=7.5, color="#444444")
    return figure, upper, axes[:panels]


def _legend_columns(columns: int) -> int:
    return 3 if columns == 3 else 2
