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
    file: Annotated[Path, typer.Argument(metavar="FILE", help="experiment file, TOML")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="figures, or panels as FIGURE/HOOKPOINT-KIND-kK; * is a wildcard"),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="in place of what the file says"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    from mpcli.sweep import collect, forecast, read, settings_of

    experiment, config = read(file, changes or ())
    if trust_remote_code:
        config = dataclasses.replace(config, trust_remote_code=True)
    if dry_run:
        return _tell_forecast(forecast(experiment, config, only or ()), json)
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
        raise type(stop)("interrupted; the same command goes on from there") from None
    for warning in outcome.warnings:
        typer.echo(f"warning: {warning}", err=True)
    rows = [dataclasses.asdict(verdict) for verdict in outcome.verdicts]
    if json:
        print_json({"verdicts": rows, "files": list(map(str, outcome.files))})
    else:
        print_table(tuple(rows[0]), rows)
        typer.echo(f"figures, tables and captions in {experiment.head.run}/figures")
    if outcome.faults:
        raise UsageError("; ".join(outcome.faults))
    return None


def _tell_forecast(found: dict[str, Any], json: bool) -> None:
    if json:
        return print_json(found)
    seconds = found["train_seconds"]
    time = "unknown: nothing like it is measured yet" if seconds is None else f"{seconds:,.0f} s"
    sides = "1 side" if found["sides"] == 1 else f"{found['sides']} sides"
    typer.echo(
        f"store     {found['rows_collected']:,} rows of {sides}, "
        f"{found['store_bytes'] / 1e9:,.2f} GB; {found['train_rows']:,} rows to train on\n"
        f"panels    {' '.join(found['panels'])}\n"
        f"coders    {found['coders_left']} to train, of {found['coders']}, on "
        f"{found['rows_trained']:,} rows each, {found['epochs']:.2f} epochs; "
        f"{found['coders_bytes'] / 1e9:,.2f} GB\n"
        f"passes    {found['passes']}\n"
        f"memory    {found['memory_bytes'] / 1e9:,.2f} GB for the coders of a pass\n"
        f"time      {time}, of train steps alone\n"
        "nothing was written"
    )
    return None


def plot(
    *,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    out: Annotated[Path, typer.Option(help="files of the figure, without ending")] = Path("fvu"),
    title: Annotated[str | None, typer.Option(help="title of the figure")] = None,
) -> None:
    from mptrain.experiments.plot_runs import plot_runs, read_curves

    for file in plot_runs(runs, out, title=title):
        typer.echo(file)
    for curve in (curve for run in runs for curve in read_curves(run)):
        if curve.diverged:
            rows = f"{curve.records[-1].rows:,}"
            typer.echo(
                f"warning: {curve.coder.name} in {curve.run} diverged after {rows} rows", err=True
            )
