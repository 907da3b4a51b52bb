"""Commands that draw figures: sweep, plot."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcache.errors import UsageError
from mpcli.arguments import Json, TrustRemoteCode
from mpcli.errors import warnings_in_words
from mpcli.tables import print_json, print_table


def sweep(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="experiment file in TOML")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="only these figures, or panels FIGURE/HOOKPOINT-KIND-kK; * matches any text"
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TABLE.KEY=VALUE",
            envvar="MPTRAIN_SET",
            help="change a setting of the file",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="print what would be done (rows, coders, bytes) and do nothing else"
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    from mpcli.sweep import collect, forecast, read, settings_of

    experiment, config = read(file, changes or ())
    if trust_remote_code:
        config = dataclasses.replace(config, trust_remote_code=True)
    if dry_run:
        return _print_forecast(forecast(experiment, config, only or ()), json)
    from mpcache.bench.hardware import hardware
    from mptrain.experiments.sweep import sweep as run
    from mptrain.kernels.device import resolve_device

    try:
        with warnings_in_words():
            outcome = run(
                experiment,
                only or (),
                settings_of(config),
                collect=functools.partial(collect, experiment, config),
                hardware=hardware(resolve_device(experiment.fit["device"])),
                quiet=False,
            )
    except KeyboardInterrupt as stop:
        raise type(stop)("interrupted; the same command continues from there") from None
    for warning in outcome.warnings:
        typer.echo(f"warning: {warning}", err=True)
    rows = [dataclasses.asdict(verdict) for verdict in outcome.verdicts]
    if json:
        print_json({"verdicts": rows, "files": list(map(str, outcome.files))})
    else:
        print_table(tuple(rows[0]), rows)
        typer.echo(f"figures, tables and captions are in {experiment.head.run}/figures")
    if outcome.faults:
        raise UsageError("; ".join(outcome.faults))
    return None


def _print_forecast(forecast: dict[str, Any], json: bool) -> None:
    if json:
        return print_json(forecast)
    seconds = forecast["train_seconds"]
    time = (
        "unknown: no similar run has been measured yet" if seconds is None else f"{seconds:,.0f} s"
    )
    sides = "1 side" if forecast["sides"] == 1 else f"{forecast['sides']} sides"
    typer.echo(
        f"store     {forecast['rows_collected']:,} rows of {sides}, "
        f"{forecast['store_bytes'] / 1e9:,.2f} GB; {forecast['train_rows']:,} rows to train on\n"
        f"panels    {' '.join(forecast['panels'])}\n"
        f"coders    {forecast['coders_left']} to train, of {forecast['coders']}, on "
        f"{forecast['rows_trained']:,} rows each, {forecast['epochs']:.2f} epochs; "
        f"{forecast['coders_bytes'] / 1e9:,.2f} GB\n"
        f"passes    {forecast['passes']}\n"
        f"memory    {forecast['memory_bytes'] / 1e9:,.2f} GB for the coders of a pass\n"
        f"time      {time}, of train steps alone\n"
        "dry run: nothing was written"
    )
    return None


def plot(
    *,
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="folders of runs, each given to fit as --run"),
    ],
    out: Annotated[
        Path, typer.Option(help="path of the figure's files, without their endings")
    ] = Path("fvu"),
    title: Annotated[str | None, typer.Option(help="title of the figure")] = None,
    json: Json = False,
) -> None:
    from mptrain.experiments.plot_runs import plot_runs, read_curves

    files = [str(file) for file in plot_runs(runs, out, title=title)]
    if json:
        print_json({"files": files})
    else:
        typer.echo("\n".join(files))
    for curve in (curve for run in runs for curve in read_curves(run)):
        if curve.diverged:
            rows = f"{curve.records[-1].rows:,}"
            typer.echo(
                f"warning: {curve.coder.name} in {curve.run} diverged after {rows} rows", err=True
            )
