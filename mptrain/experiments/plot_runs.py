"""FVU over train time from the metrics of runs: a figure, and the table behind it."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.data.atomic_files import explain_write_errors, json_safe
from mptrain.experiments.ahead import Curve, describe_lead
from mptrain.experiments.drawing import (
    DASHES,
    DrawnLine,
    DrawnPanel,
    LineStyle,
    draw_panels,
    needs_log_axis,
    panel_title,
    save_figure,
    time_axis,
)
from mptrain.experiments.plain_comparison import mean, seconds_curve, shares_ahead
from mptrain.experiments.tables import write_table
from mptrain.runs.convergence import Convergence, convergence_of, describe_convergence
from mptrain.runs.metrics_file import Record, read_records
from mptrain.runs.run_dir import read_manifest, recorded_coders
from mptrain.training.learning_rate import rule_of

PanelKey = tuple[str, str, int | None]  # hookpoint, kind, k

# settings that the panel, the color or several thin lines of one style show
_SHOWN_SETTINGS = ("inputs", "targets", "kind", "arch", "k", "seed")
_THIN = 0.9  # width of the lines of several seeds or runs
_ENDINGS = (".png", ".svg", ".csv", ".json")


@dataclass(frozen=True)
class ValidationCurve:
    """The validations of a coder in a run."""

    run: Path
    coder: CoderConfig
    records: tuple[Record, ...]

    @property
    def panel(self) -> PanelKey:
        return panel_of(self.coder)

    @property
    def diverged(self) -> bool:
        """Whether the last validation is not finite; the curve is drawn up to there."""
        return not math.isfinite(float(self.records[-1].validation_fvu or 0))

    @property
    def convergence(self) -> Convergence | None:
        """How FVU fell, as far as the coder is trained."""
        return convergence_of(self.records, rule_of(self.coder).steps)

    @property
    def finite_records(self) -> list[Record]:
        """The finite validations."""
        return [r for r in self.records if math.isfinite(float(r.validation_fvu or 0))]

    def finite_points(self) -> Curve:
        """(train seconds, FVU) of the finite validations."""
        return seconds_curve(self.finite_records)


def panel_of(coder: CoderConfig) -> PanelKey:
    """The panel that a coder is drawn in."""
    return (coder.sides_name, coder.kind, coder.k)


def plot_runs(
    runs: Sequence[Path | str], out: Path | str = "fvu", *, title: str | None = None
) -> list[Path]:
    """Draw the validation FVU of all coders of some runs over their train time.

    The figure has a panel for each hookpoint, kind and k. Train time is that of the coder's own
    train steps. Each validation is also a row of a table, with the coder's settings.

    Example:
        >>> from mptrain.experiments.plot_runs import plot_runs
        >>> for file in plot_runs(["run"], "figures/fvu", title="demo model"):
        ...     print(file)
        figures/fvu.png
        figures/fvu.svg
        figures/fvu.csv
        figures/fvu.json

    Args:
        runs: folders of runs.
        out: path of the files without ending: png, svg, csv and json are written.
        title: title of the figure; default: what the runs were trained on.

    Returns:
        The paths of the four files.

    Raises:
        UsageError: a folder is no run, a coder was not validated yet, or `out` is not writable.
    """
    folders, stem = [Path(run) for run in runs], Path(out)
    curves = [curve for run in folders for curve in read_curves(run)]
    if title is None:
        title = "; ".join(dict.fromkeys(read_manifest(run).source for run in folders))
    if not curves:
        raise UsageError("no runs to plot; give the folder of at least one run")
    return write_figure(runs_figure(curves, title), _table_rows(curves), stem)


def write_figure(figure: Figure, rows: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """Write a figure as png and svg, and its table as csv and json; gives the four paths."""
    stem = stem.with_suffix("") if stem.suffix in _ENDINGS else stem
    files = save_figure(figure, stem)
    with explain_write_errors(stem.parent):
        return [*files, *write_table(rows, stem)]


def read_curves(run: Path) -> list[ValidationCurve]:
    """The curves of a run, in the order of its config.

    Raises:
        UsageError: the folder is no run, or a coder was not validated yet.
    """
    coders = recorded_coders(run)
    try:
        records = read_records(run / "metrics.jsonl")
    except FileNotFoundError as error:
        raise UsageError(
            f"the run {run} has not been trained: {error.filename} does not exist; give the "
            "folder of a "
            "trained run"
        ) from error
    return [_read_curve(run, coder, records) for coder in coders]


def line_styles(coders: Sequence[CoderConfig]) -> dict[str, LineStyle]:
    """The style of each coder by its name; the legend names the settings that set it apart."""
    differing = [
        field
        for field in fields(CoderConfig)
        if field.name not in _SHOWN_SETTINGS
        and len({getattr(coder, field.name) for coder in coders}) > 1
    ]
    styles: dict[str, LineStyle] = {}
    dashes: dict[str, str] = {}
    for coder in coders:
        values = [(field, getattr(coder, field.name)) for field in differing]
        settings = "".join(
            f", {_setting(field.name, value)}" for field, value in values if value != field.default
        )
        dash = dashes.setdefault(settings, DASHES[len(dashes) % len(DASHES)])
        architecture = coder.architecture
        styles[coder.name] = LineStyle(architecture.label + settings, architecture.color, dash)
    return styles


def _setting(name: str, value: object) -> str:
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value}"


def runs_figure(curves: Sequence[ValidationCurve], title: str | None) -> Figure:
    """The figure; panels of the same kind and k stand together."""
    keys = sorted({curve.panel for curve in curves}, key=panel_order)
    styles = line_styles([curve.coder for curve in curves])
    by_panel = [[curve for curve in curves if curve.panel == key] for key in keys]
    longest = max(record.train_seconds for curve in curves for record in curve.records)
    return draw_panels(
        [
            DrawnPanel(panel_title(*key), tuple(_drawn_lines(panel_curves, styles)))
            for key, panel_curves in zip(keys, by_panel, strict=True)
        ],
        list({style.label: style for style in styles.values()}.values()),
        time_axis("train time of the coder", longest),
        title=title,
        y_label="FVU on validation rows",
        is_log_y=any(needs_log_axis(*_fvu_range(panel_curves)) for panel_curves in by_panel),
        caption=caption(by_panel),
    )


def caption(panels: Sequence[Sequence[ValidationCurve]]) -> str:
    """Whether the coders were still falling, and from which share on MP is ahead of TopK."""
    convergences = [curve.convergence for panel in panels for curve in panel]
    leads = [lead for panel in panels if (lead := _lead(panel)) is not None]
    sentences = [describe_convergence(convergences)]
    if leads:
        sentences += [describe_lead([rows for rows, _ in leads], [time for _, time in leads])]
    return "".join(f"{sentence}. " for sentence in sentences if sentence).rstrip()


def _lead(curves: Sequence[ValidationCurve]) -> tuple[float | None, float | None] | None:
    """The shares of rows and of train time from which MP stays below TopK in a panel.

    Both are means over seeds, None where a seed does not stay below. The result is None where a
    seed has several curves of an architecture: which of them to compare would be a guess.
    """
    by_key = {
        (curve.coder.arch, curve.coder.seed): [] if curve.diverged else curve.finite_records
        for curve in curves
    }
    pairs = [
        (records, other)
        for (arch, seed), records in by_key.items()
        if arch == "mp" and records and (other := by_key.get(("topk", seed)))
    ]
    if len(by_key) < len(curves) or not pairs:
        return None
    by_rows, by_seconds = shares_ahead(pairs)
    return _mean_of_all(by_rows), _mean_of_all(by_seconds)


def _mean_of_all(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return mean(known) if len(known) == len(shares) else None


def _read_curve(run: Path, coder: CoderConfig, records: Sequence[Record]) -> ValidationCurve:
    own = tuple(r for r in records if r.coder == coder.name and r.validation_fvu is not None)
    if not own:
        raise UsageError(
            f"{coder.name} of {run} has no validation to draw yet; wait until the run has "
            "validated it once, or train it with a smaller --eval-every"
        )
    return ValidationCurve(run, coder, own)


def coder_columns(run: Path | str, coder: CoderConfig) -> dict[str, Any]:
    """What a line of a table says of the coder: its run, its hookpoint and its settings."""
    return {
        "run": str(run),
        "hookpoint": coder.sides_name,
        **asdict(coder),
        "inputs": ",".join(coder.inputs),
        "targets": ",".join(coder.targets),
    }


def _table_rows(curves: Sequence[ValidationCurve]) -> list[dict[str, Any]]:
    return [
        {
            **coder_columns(curve.run, curve.coder),
            **{name: json_safe(value) for name, value in asdict(record).items()},
            **ends,
        }
        for curve in curves
        for ends in [_convergence_columns(curve.convergence)]
        for record in curve.records
    ]


def _convergence_columns(convergence: Convergence | None) -> dict[str, Any]:
    """The end of a curve, the same in each of its rows."""
    names = ("slope", "middle_slope", "gain_of_doubling", "still_falling")
    return {name: None if convergence is None else getattr(convergence, name) for name in names}


def _drawn_lines(
    curves: Sequence[ValidationCurve], styles: Mapping[str, LineStyle]
) -> list[DrawnLine]:
    has_repeats = len(curves) > len({styles[curve.coder.name] for curve in curves})  # seeds, runs
    lines = []
    for curve in curves:
        style, points = styles[curve.coder.name], curve.finite_points()
        lines.append(
            DrawnLine(
                replace(style, width=_THIN) if has_repeats else style,
                x=tuple(seconds for seconds, _ in points),
                y=tuple(fvu for _, fvu in points),
            )
        )
    return lines


def _fvu_range(curves: Sequence[ValidationCurve]) -> tuple[float, float]:
    fvus = [fvu for curve in curves for _, fvu in curve.finite_points()]
    return min(fvus, default=0.0), max(fvus, default=0.0)


def panel_order(panel: PanelKey) -> tuple[str, int, str, list[int]]:
    """Kind, k, then the layers of each module: layers.2, layers.10, layers.2.mlp, layers.10.mlp."""
    hookpoint, kind, k = panel
    numbers = re.findall(r"\d+", hookpoint)
    return kind, k or 0, re.sub(r"\d+", "*", hookpoint), [int(number) for number in numbers]
