"""Line plots of FVU in panels, with one legend and a caption: the layout of all figures."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from mptrain.data.atomic_files import explain_write_errors

DASHES = ("-", "--", ":", "-.")
RC_PARAMS: dict[Any, Any] = {  # Any: matplotlib's own type lists all its keys
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "mptrain",  # the same figure is the same bytes
}
_DPI = 200
_PANEL_INCHES = 3.0  # three panels are as wide as a README: 900 pixels at 100 dpi
_MANY_LINES = 6  # more lines than that call for higher panels
_LOG_RATIO = 4  # ratio of the highest to the lowest FVU from which the axis is logarithmic
_FEW_POINTS = 10  # lines of fewer points have markers: a single point would not show otherwise
_LEGEND_CHARACTERS = 13  # per inch, in the legend's font
_CAPTION_CHARACTERS = 17  # per inch, in the caption's font


@dataclass(frozen=True)
class LineStyle:
    """Label and appearance of a line."""

    label: str
    color: str
    dash: str = "-"
    width: float = 1.6

    def line2d_options(self) -> dict[str, Any]:
        """Keyword arguments of a matplotlib line."""
        return {"color": self.color, "linestyle": self.dash, "linewidth": self.width}


@dataclass(frozen=True)
class DrawnLine:
    """Points of a line, and the band around them where `low` and `high` are given."""

    style: LineStyle
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    circled: int | None = None
    "index of a point that is circled"


@dataclass(frozen=True)
class DrawnPanel:
    """The lines of a panel; thick lines are in front."""

    title: str
    lines: tuple[DrawnLine, ...]
    y_limits: tuple[float, float] | None = None
    "None: matplotlib's own choice"
    marked_x: float | None = None
    "x of a grey vertical line"


@dataclass(frozen=True)
class XAxis:
    """What the x axes of a figure show."""

    label: str
    divisor: float = 1.0
    "x values are divided by it: seconds by 60 for minutes"
    has_prefixes: bool = False
    "whether numbers are shown as 10k and 2M"
    is_log2: bool = False
    "whether the axis is logarithmic, with a tick at each x"


def time_axis(label: str, longest: float) -> XAxis:
    """An axis of times in seconds, minutes or hours, whichever suits the longest (seconds)."""
    if longest < 300:
        return XAxis(f"{label} (s)")
    return XAxis(f"{label} (min)", 60.0) if longest < 2 * 3600 else XAxis(f"{label} (h)", 3600.0)


def needs_log_axis(low: float, high: float) -> bool:
    """Whether FVUs from `low` to `high` are easier to read on a logarithmic axis."""
    return low > 0 and high / low >= _LOG_RATIO


def panel_title(hookpoint: str, kind: str, k: int | None) -> str:
    """The title of a panel, in two lines."""
    kind = kind.replace("sae", "SAE")
    return f"{hookpoint}\n{kind}" if k is None else f"{hookpoint}\n{kind}, k = {k}"


def draw_panels(
    panels: Sequence[DrawnPanel],
    legend: Sequence[LineStyle],
    x_axis: XAxis,
    *,
    title: str | None,
    y_label: str,
    is_log_y: bool,
    caption: str = "",
) -> Figure:
    """A figure of all panels; the legend and the caption stand below them."""
    with matplotlib.rc_context(RC_PARAMS):
        columns = 2 if len(panels) == 4 else min(3, len(panels))
        figure, upper, axes = _empty_figure(len(panels), columns, legend, caption)
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, x_axis)
            if is_log_y and any(line.x for line in panel.lines):
                _set_log_y_(ax)
        for ax in axes[-columns:]:  # the lowest of each column
            ax.set_xlabel(x_axis.label)
        for ax in axes[::columns]:
            ax.set_ylabel(y_label)
        if title:
            upper.suptitle(title, fontsize=11)
        upper.legend(
            handles=[Line2D([], [], label=s.label, **s.line2d_options()) for s in legend],
            loc="outside lower center",
            ncols=_legend_columns(columns, legend),
            frameon=False,
        )
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as `stem` with the endings png and svg; gives their paths.

    Raises:
        UsageError: the folder cannot be written.
    """
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    with explain_write_errors(stem.parent), matplotlib.rc_context(RC_PARAMS):
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[0], dpi=_DPI)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _empty_figure(
    panels: int, columns: int, legend: Sequence[LineStyle], caption: str
) -> tuple[Figure, Figure | SubFigure, list[Axes]]:
    """A figure, its part above the caption, and the axes."""
    rows, width = -(-panels // columns), _figure_width(columns)
    panel_height = (1.15 if len(legend) > _MANY_LINES else 0.78) * _PANEL_INCHES
    legend_height = 0.19 * -(-len(legend) // _legend_columns(columns, legend))
    height = rows * panel_height + legend_height + 0.6
    if caption:
        text = textwrap.fill(caption, int(width * _CAPTION_CHARACTERS))
        heights = (height, 0.14 * (text.count("\n") + 1) + 0.08)
        figure = Figure((width, sum(heights)), layout="constrained")
        upper: Figure | SubFigure
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flatten()
        lower.text(0.01, 1, text, va="top", fontsize=7.5, color="#444444")
    else:
        upper = figure = Figure((width, height), layout="constrained")
    axes = upper.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes[panels:]:
        ax.remove()
    return figure, upper, axes[:panels]


def _figure_width(columns: int) -> float:
    return max(2, columns) * _PANEL_INCHES


def _legend_columns(columns: int, legend: Sequence[LineStyle]) -> int:
    """As many columns as the longest label allows, at most three."""
    longest = 8 + max((len(style.label) for style in legend), default=0)  # 8: line and gap
    return max(1, min(3, int(_figure_width(columns) * _LEGEND_CHARACTERS) // longest))


def _draw_panel(ax: Axes, panel: DrawnPanel, x_axis: XAxis) -> None:
    for line in panel.lines:
        x = [value / x_axis.divisor for value in line.x]
        marker = "." if len(x) < _FEW_POINTS or x_axis.is_log2 else ""
        order = 2 + line.style.width
        ax.plot(x, line.y, marker=marker, zorder=order, **line.style.line2d_options())
        if line.circled is not None:
            at = x[line.circled], line.y[line.circled]
            ax.plot(*at, "o", color=line.style.color, fillstyle="none", markersize=9)
        if line.low:
            ax.fill_between(x, line.low, line.high, color=line.style.color, alpha=0.2, linewidth=0)
    ax.set_title(panel.title)
    if panel.y_limits:
        ax.set_ylim(*panel.y_limits)
    if panel.marked_x is not None:
        ax.axvline(panel.marked_x, color="#9a9a9a", linewidth=0.8, zorder=0)
    if x_axis.is_log2:
        _set_log2_x_(ax, sorted({x for line in panel.lines for x in line.x}))
    else:
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    if x_axis.has_prefixes:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _set_log2_x_(ax: Axes, ticks: Sequence[float]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _set_log_y_(ax: Axes) -> None:
    """A logarithmic axis with labels at 1, 2, 3 and 5 of each decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
