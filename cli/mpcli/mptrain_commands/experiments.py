"""Commands that draw figures: sweep, plot."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcache.errors import UsageError
from mpcli.arguments import Json, TrustRemoteCode
from mpcli.errors import warnings_in_words
from mpcli.tables import print_json, print_table

if TYPE_CHECKING:  # torch is imported when the command runs
    from mptrain.experiments.sweep import SweepResult

_ONLY_IN_FILES = ("slope", "seeds_ahead_by_rows", "seeds_ahead_by_seconds")
"fields of a verdict that the table on the terminal leaves out"

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        envvar="MPTRAIN_SET",
        help="change a setting of FILE; can be repeated; example: --set data.rows=100000",
    ),
]


def sweep(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="experiment file in TOML format")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIGURE",
            help="run only this figure, or this panel, written FIGURE/HOOKPOINT-KIND-kK, such as "
            "main/layers.10-sae-k64; * is any text; can be repeated",
        ),
    ] = None,
    changes: Changes = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="print what the command would do (rows, coders, bytes) and do nothing else",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    from mpcli.sweep_collection import collect_settings, collect_sides, estimate, read_experiment

    experiment, config = read_experiment(file, changes or ())
    if trust_remote_code:
        config = dataclasses.replace(config, trust_remote_code=True)
    if dry_run:
        return _print_estimate(estimate(experiment, config, only or ()), json)
    from mpcache.bench.hardware import hardware
    from mptrain.experiments.sweep import sweep as run_sweep
    from mptrain.kernels.device import resolve_device

    try:
        with warnings_in_words():
            result = run_sweep(
                experiment,
                only=only or (),
                collect=functools.partial(collect_sides, experiment, config),
                collect_settings=collect_settings(config),
                hardware=hardware(resolve_device(experiment.run_settings["device"])),
                quiet=False,
            )
    except KeyboardInterrupt as stop:
        raise type(stop)("interrupted; run the same command again to continue") from None
    _print_result(result, experiment.header.folder, json)
    return None


def _print_result(result: "SweepResult", folder: str, json: bool) -> None:
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    rows = [dataclasses.asdict(verdict) for verdict in result.verdicts]
    if json:
        print_json({"verdicts": rows, "files": list(map(str, result.files))})
    else:
        print_table([name for name in rows[0] if name not in _ONLY_IN_FILES], rows)
        typer.echo(f"figures, tables and captions are in {folder}/figures")
    if result.problems:
        raise UsageError("; ".join(result.problems))


def _print_estimate(estimate: dict[str, Any], json: bool) -> None:
    if json:
        return print_json(estimate)
    seconds = estimate["train_seconds"]
    time = (
        "unknown: no similar run has been measured yet" if seconds is None else f"{seconds:,.0f} s"
    )
    sides = "1 side" if estimate["sides"] == 1 else f"{estimate['sides']} sides"
    typer.echo(
        f"store     {estimate['rows_collected']:,} rows of {sides}, "
        f"{estimate['store_bytes'] / 1e9:,.2f} GB; {estimate['train_rows']:,} rows to train on\n"
        f"panels    {' '.join(estimate['panels'])}\n"
        f"coders    {estimate['coders_left']} to train, of {estimate['coders']}, on "
        f"{estimate['rows_trained']:,} rows each, {estimate['epochs']:.2f} epochs; "
        f"{estimate['coders_bytes'] / 1e9:,.2f} GB\n"
        f"passes    {estimate['passes']}\n"
        f"memory    {estimate['memory_bytes'] / 1e9:,.2f} GB for the coders of a pass\n"
        f"time      {time}, for the train steps only\n"
        "dry run: nothing was written"
    )
    return None


def plot(
    *,
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="folders of runs (the values of `mptrain fit --run`)"),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="output path without file extension; writes PATH.png, .svg, .csv and .json",
        ),
    ] = Path("fvu"),
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="title of the figure")] = None,
    over: Annotated[
        str | None,
        typer.Option(
            metavar="SETTING",
            help=(
                "draw FVU over this setting (lr, auxk-alpha, sparsity-weight, bandwidth) instead "
                "of train time, for runs with --tune or with several values of --lr"
            ),
        ),
    ] = None,
    json: Json = False,
) -> None:
    from mptrain.experiments.plot_runs import plot_runs, read_curves
    from mptrain.experiments.plot_tuning import plot_tuning

    if over is not None:
        return _print_files(plot_tuning(runs, over.replace("-", "_"), out, title=title), json)
    _print_files(plot_runs(runs, out, title=title), json)
    for curve in (curve for run in runs for curve in read_curves(run)):
        if curve.diverged:
            rows = f"{curve.records[-1].rows:,}"
            typer.echo(
                f"warning: {curve.coder.name} in {curve.run} diverged after {rows} rows", err=True
            )
    return None


def _print_files(paths: list[Path], json: bool) -> None:
    files = [str(path) for path in paths]
    if json:
        print_json({"files": files})
    else:
        typer.echo("\n".join(files))
