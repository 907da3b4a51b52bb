"""FVU over a setting that was tuned, or given as a list: a figure, and the table behind it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_json import coder_config_from_json
from mptrain.data.atomic_files import json_safe, read_json
from mptrain.experiments.drawing import (
    DrawnLine,
    DrawnPanel,
    LineStyle,
    XAxis,
    draw_panels,
    needs_log_axis,
    panel_title,
)
from mptrain.experiments.plot_runs import (
    coder_columns,
    line_styles,
    panel_of,
    panel_order,
    write_figure,
)
from mptrain.runs.results import CoderResult
from mptrain.runs.run_dir import recorded_coders
from mptrain.tuning.tune import FACTORS


@dataclass(frozen=True, kw_only=True)
class TriedValue:
    """The FVU of a coder at one value of a setting."""

    run: str
    coder: CoderConfig
    "the coder without the setting"
    value: float
    fvu: float
    (
        "on validation rows, of a search on those that did not choose the value; infinite if the "
        "coder diverged"
    )
    is_best: bool
    "whether the search chose the value, or no other value of the run has a lower FVU"


def plot_tuning(
    runs: Sequence[Path | str], setting: str, out: Path | str, *, title: str | None = None
) -> list[Path]:
    """Draw the validation FVU of all coders of some runs over a setting such as `lr`.

    The figure has a panel for each hookpoint, kind and k, and a line for each coder; the best value
    of a line is circled. Runs are searches of `mptrain fit --tune`, or ordinary runs with several
    values of the setting.

    Args:
        runs: folders of runs.
        setting: `lr` or another setting that can be tuned.
        out: path of the files without ending: png, svg, csv and json are written.
        title: title of the figure; default: none.

    Returns:
        The paths of the four files.

    Raises:
        UsageError: a folder is no run, no coder has two values of the setting, or `out` is not
            writable.
    """
    if setting not in FACTORS:
        raise UsageError(f"over must be one of {', '.join(FACTORS)}, got {setting}")
    values = [value for run in runs for value in read_values(Path(run), setting)]
    lines = _lines_of(values)
    if not any(len(line) > 1 for line in lines):
        raise UsageError(
            f"no coder of {', '.join(map(str, runs))} has two values of {setting}; give a run of "
            f"mptrain fit --tune {setting.replace('_', '-')}"
        )
    if not any(math.isfinite(value.fvu) for value in values):
        raise UsageError(f"all coders of {', '.join(map(str, runs))} diverged; use lower values")
    rows = [
        {
            **coder_columns(value.run, value.coder),
            setting: value.value,
            "fvu": json_safe(value.fvu),
        }
        for line in lines
        for value in line
    ]
    return write_figure(tuning_figure(lines, setting, title), rows, Path(out))


def read_values(run: Path, setting: str) -> Iterator[TriedValue]:
    """The values of a setting that a run tried, in no particular order.

    Raises:
        UsageError: the folder holds neither a search nor a finished run.
    """
    if (run / "tuning.json").exists():
        for search in read_json(run / "tuning.json"):
            if search["setting"] == setting:
                coder = coder_config_from_json(search["coder"])
                for trial in search["trials"]:
                    fvu = float(trial["report_fvu"])
                    value = trial["value"]
                    yield _tried(run, coder, setting, value, fvu, value == search["best"])
        return
    coders, file = recorded_coders(run), run / "results.json"
    results = map(CoderResult.from_json, read_json(file) if file.exists() else [])
    fvus = {r.coder: r.validation.fvu if r.validation else math.inf for r in results}
    if not {coder.name for coder in coders} <= fvus.keys():
        raise UsageError(f"the run {run} is not finished; run its command again to continue it")
    default: dict[str, Any] = {setting: getattr(CoderConfig, setting)}
    for coder in coders:
        twins = [fvus[c.name] for c in coders if replace(c, **default) == replace(coder, **default)]
        if getattr(coder, setting) is not None:
            fvu = fvus[coder.name]
            yield _tried(run, coder, setting, getattr(coder, setting), fvu, fvu == min(twins))


def tuning_figure(lines: Sequence[Sequence[TriedValue]], setting: str, title: str | None) -> Figure:
    """The figure; each line has its values in order."""
    coders = [line[0].coder for line in lines]
    styles = line_styles(coders)
    keys = sorted({panel_of(coder) for coder in coders}, key=panel_order)
    fvus = [value.fvu for line in lines for value in line if math.isfinite(value.fvu)]
    return draw_panels(
        [
            DrawnPanel(
                panel_title(*key),
                tuple(
                    _drawn(line, styles[line[0].coder.name])
                    for line in lines
                    if panel_of(line[0].coder) == key
                ),
            )
            for key in keys
        ],
        list({style.label: style for style in styles.values()}.values()),
        XAxis(_AXIS_LABELS.get(setting, setting.replace("_", " ")), is_log2=True),
        title=title,
        y_label="FVU on validation rows",
        is_log_y=needs_log_axis(min(fvus), max(fvus)),
    )


_AXIS_LABELS = {"lr": "peak learning rate"}


def _tried(
    run: Path, coder: CoderConfig, setting: str, value: float, fvu: float, is_best: bool
) -> TriedValue:
    default: dict[str, Any] = {setting: getattr(CoderConfig, setting)}
    return TriedValue(
        run=str(run), coder=replace(coder, **default), value=value, fvu=fvu, is_best=is_best
    )


def _lines_of(values: Sequence[TriedValue]) -> list[list[TriedValue]]:
    """The values of each coder of each run, from the lowest to the highest."""

    def line(value: TriedValue) -> tuple[str, str]:
        return value.run, value.coder.name

    ordered = sorted(values, key=lambda value: (*line(value), value.value))
    return [list(group) for _, group in groupby(ordered, key=line)]


def _drawn(line: Sequence[TriedValue], style: LineStyle) -> DrawnLine:
    finite = [value for value in line if math.isfinite(value.fvu)]
    return DrawnLine(
        style,
        x=tuple(value.value for value in finite),
        y=tuple(value.fvu for value in finite),
        circled=next((i for i, value in enumerate(finite) if value.is_best), None),
    )
