"""FVU over train time from runs' metrics: a figure, and the table behind it."""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.data.atomic_files import explain_write_errors, json_safe
from mptrain.runs.metrics import Record, read_records
from mptrain.runs.run_dir import read_run_config

STYLES = ("-", "--", ":", "-.")
# settings that panels, colours and thin lines show already
SHOWN = ("hookpoint", "kind", "arch", "k", "seed")
LOG_FROM = 4  # ratio of the largest to the smallest FVU in a panel that calls for a log axis
PANEL_INCHES = 3.0
DPI = 200
RC: dict[Any, Any] = {  # Any: matplotlib's own type lists all its keys
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "mptrain",  # the same figure is the same bytes
}
Panel = tuple[str, str, int]


@dataclass(frozen=True)
class Curve:
    """A coder's validations."""

    run: Path
    coder: CoderConfig
    records: tuple[Record, ...]

    @property
    def panel(self) -> Panel:
        return (self.coder.hookpoint, self.coder.kind, self.coder.k)

    @property
    def diverged(self) -> bool:
        """Whether its last validation is not finite; it is drawn until then."""
        return not math.isfinite(float(self.records[-1].validation_fvu or 0))

    def finite(self) -> list[tuple[float, float]]:
        """(train seconds, FVU) of the validations that can be drawn."""
        pairs = [(r.train_seconds, float(r.validation_fvu or 0)) for r in self.records]
        return [(seconds, fvu) for seconds, fvu in pairs if math.isfinite(fvu)]


def plot_runs(runs: Sequence[Path], out: Path, *, title: str | None = None) -> list[Path]:
    """Draw the validation FVU of all coders over their own train time, a panel for each
    hookpoint, kind and k. Writes `out` with the endings png, svg, csv and json; gives their paths.

    Raises:
        ValueError: a run is no run, one of its coders has not been validated, or `out` cannot be
            written.
    """
    curves = [curve for run in runs for curve in read_curves(run)]
    if title is None:
        title = "; ".join(dict.fromkeys(read_run_config(run)["source"] for run in runs))
    if not curves:
        raise UsageError("there is nothing to plot; name at least one run")
    stem = out.with_suffix("") if out.suffix in (".png", ".svg", ".csv", ".json") else out
    paths = [stem.with_name(f"{stem.name}.{end}") for end in ("png", "svg", "csv", "json")]
    with explain_write_errors(stem.parent), matplotlib.rc_context(RC):
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(curves, title)
        figure.savefig(paths[0], dpi=DPI)
        figure.savefig(paths[1], metadata={"Date": None})
        write_table(curves, *paths[2:])
    return paths


def read_curves(run: Path) -> list[Curve]:
    """The curves of a run, in the order of its config."""
    coders = read_run_config(run)["coders"]
    try:
        records = read_records(run / "metrics.jsonl")
    except FileNotFoundError as error:
        raise UsageError(f"{run} is no run that has been trained: no {error.filename}") from error
    return [_curve(run, coder, records) for coder in coders]


def _curve(run: Path, coder: dict[str, Any], records: Sequence[Record]) -> Curve:
    name = coder["name"]
    own = tuple(r for r in records if r.coder == name and r.validation_fvu is not None)
    if not own:
        raise UsageError(
            f"{run / 'metrics.jsonl'} has no validation of {name}; "
            "let the run reach its first one, or use a smaller eval_every"
        )
    config = CoderConfig(**{key: value for key, value in coder.items() if key != "name"})
    return Curve(run, config, own)


def write_table(curves: Sequence[Curve], csv_path: Path, json_path: Path) -> None:
    """A row for each point of the figure, with the coder's settings."""
    rows = [
        {
            "run": str(curve.run),
            **asdict(curve.coder),
            **{name: json_safe(value) for name, value in asdict(record).items()},
        }
        for curve in curves
        for record in curve.records
    ]
    json_path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Look:
    """How the curves of one architecture with one set of other settings are drawn."""

    label: str
    color: str
    style: str

    def line(self, width: float) -> dict[str, Any]:
        return {"color": self.color, "linestyle": self.style, "linewidth": width}


def looks(curves: Sequence[Curve]) -> dict[str, Look]:
    """The look of each coder by its name; the legend names the settings that differ."""
    names = [field.name for field in fields(CoderConfig) if field.name not in SHOWN]
    differing = [n for n in names if len({getattr(c.coder, n) for c in curves}) > 1]
    found = {}
    styles: dict[str, str] = {}
    for coder in (curve.coder for curve in curves):
        settings = "".join(f", {n.replace('_', ' ')} {getattr(coder, n)}" for n in differing)
        color, label = coder.architecture.color, coder.architecture.label
        style = styles.setdefault(settings, STYLES[len(styles) % len(STYLES)])
        found[coder.name] = Look(label + settings, color, style)
    return found


def draw(curves: Sequence[Curve], title: str | None) -> Figure:
    """The figure; panels of the same kind and k stand together."""
    panels = sorted({curve.panel for curve in curves}, key=_panel_order)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    found, (unit, seconds) = looks(curves), time_unit(_longest(curves))
    labels = {one.label: one for one in found.values()}
    figure, axes = _empty_panels(len(panels), columns, len(labels))
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, [c for c in curves if c.panel == panel], found, seconds)
    for ax in axes[-columns:]:  # the lowest of each column
        ax.set_xlabel(f"train time of the coder ({unit})")
    for ax in axes[::columns]:
        ax.set_ylabel("FVU on validation rows")
    spreads = [_spread([c for c in curves if c.panel == panel]) for panel in panels]
    for ax, spread in zip(axes, spreads, strict=True):
        if spread and max(spreads) >= LOG_FROM:
            log_y(ax)
    if title:
        figure.suptitle(title, fontsize=11)
    handles = [Line2D([], [], label=label, **one.line(1.6)) for label, one in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, columns), frameon=False)
    return figure


def _empty_panels(panels: int, columns: int, labels: int) -> tuple[Figure, list[Axes]]:
    """A figure with room for a legend; three panels are as wide as a README, 900 px at 100 dpi."""
    rows, legend_rows = -(-panels // columns), -(-labels // min(2, columns))
    inches = (
        max(1.7, columns) * PANEL_INCHES,
        rows * 0.75 * PANEL_INCHES + 0.2 * legend_rows + 0.7,
    )
    figure = Figure(inches, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes[panels:]:
        ax.remove()
    return figure, axes[:panels]


def _draw_panel(
    ax: Axes, curves: Sequence[Curve], found: Mapping[str, Look], seconds: float
) -> None:
    several = len(curves) > len({found[curve.coder.name] for curve in curves})  # seeds, runs
    for curve in curves:
        points = curve.finite()
        ax.plot(
            [time / seconds for time, _ in points],
            [fvu for _, fvu in points],
            marker="." if len(points) < 10 else "",  # a single point would not show otherwise
            **found[curve.coder.name].line(0.9 if several else 1.6),
        )
    hookpoint, kind, k = curves[0].panel
    ax.set_title(f"{hookpoint}\n{kind.replace('sae', 'SAE')}, k = {k}")
    ax.set_xlim(left=0)


def log_y(ax: Axes) -> None:
    """A logarithmic axis that is labelled at 1, 2, 3 and 5 of each decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _spread(curves: Sequence[Curve]) -> float:
    """Largest by smallest FVU; 0 where there is no logarithm to draw."""
    fvus = [fvu for curve in curves for _, fvu in curve.finite()]
    return max(fvus) / min(fvus) if fvus and min(fvus) > 0 else 0.0


def time_unit(longest: float) -> tuple[str, float]:
    """The unit for times up to so many seconds, and its seconds."""
    if longest < 300:
        return "s", 1.0
    return ("min", 60.0) if longest < 2 * 3600 else ("h", 3600.0)


def _longest(curves: Sequence[Curve]) -> float:
    return max(record.train_seconds for curve in curves for record in curve.records)


def _panel_order(panel: Panel) -> tuple[str, int, str, list[int]]:
    """Kind, k, then all layers of one place: layers.2, layers.10, layers.2.mlp, layers.10.mlp."""
    hookpoint, kind, k = panel
    numbers = re.findall(r"\d+", hookpoint)
    return kind, k, re.sub(r"\d+", "*", hookpoint), [int(number) for number in numbers]
