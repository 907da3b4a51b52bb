"""`mpcache`: collect activations, and look at stores. Stages are imported when a command runs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

import mpcache
from cli.errors import guarded
from cli.options import from_config
from cli.tables import print_json, print_table
from mpcache.config import CollectConfig
from mpcache.workforce import Workforce

app = typer.Typer(
    help="Run a language model once and keep its activations in a Zarr store.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="folder of the store")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def main() -> None:
    """Entry point."""
    app()


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False,
) -> None:
    if show:
        typer.echo(mpcache.__version__)
        raise typer.Exit


@app.command()
@guarded
@from_config(CollectConfig, Workforce, arguments=("model", "dataset"))
def collect(
    config: CollectConfig, workforce: Workforce, store: StorePath, json: Json = False
) -> None:
    """Fill a store, or what is missing of it; exit code 1 if parts could not be collected."""
    from mpcache.collect import collect as run

    try:
        done = run(config, store, workforce, quiet=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; what was committed stays, the same command goes on from there"
        ) from None
    if json:
        print_json(dataclasses.asdict(done))
    else:
        _tell(done, config.rows)
    if done.missing:
        raise typer.Exit(1)


def _tell(done: Any, wanted: int) -> None:
    if not done.forward_rows:
        typer.echo("everything was there already: no forward pass was needed")
    share = "" if done.share == "1/1" else f", share {done.share}"
    typer.echo(
        f"{done.store}{share}: {done.rows:,} rows in {done.parts} parts, {done.bytes / 1e9:.2f} GB"
        f", {done.forward_rows:,} rows collected now in {done.seconds:.0f} s"
    )
    if done.exhausted:
        typer.echo(f"the dataset ended before the {wanted:,} rows wanted", err=True)
    if done.nonfinite:
        typer.echo(
            f"warning: {done.nonfinite:,} values are not finite; see mpcache stats", err=True
        )
    for part in done.missing:
        typer.echo(f"part {part.part} is missing, tried {part.times} times: {part.cause}", err=True)
    if done.missing:
        typer.echo(
            f"error: {len(done.missing)} parts are missing; the same command tries them again",
            err=True,
        )


@app.command()
@guarded
def info(*, store: StorePath, json: Json = False) -> None:
    """Provenance, hookpoints, rows, bytes and parts done of a store."""
    from mpcache.stats import info as run

    found = run(store)
    if json:
        return print_json(found)
    model, dataset = found["provenance"]["model"], found["provenance"]["dataset"]
    typer.echo(f"store        {found['store']}")
    typer.echo(f"model        {_pairs(model)}")
    typer.echo(f"dataset      {_pairs(dataset)}")
    typer.echo(f"fingerprint  {found['fingerprint']}")
    typer.echo(f"planned      {found['rows_planned']:,} rows in {found['parts_planned']} parts")
    columns = (
        "hookpoint",
        "side",
        "width",
        "parts",
        "rows",
        "rows_validation",
        "bytes",
        "nonfinite",
    )
    return print_table(columns, found["hookpoints"])


@app.command()
@guarded
def verify(*, store: StorePath, json: Json = False) -> None:
    """Check every byte of a store; exit code 1 if committed data is damaged."""
    from mpcache.verify import verify as run

    verdict = run(store, quiet=json)
    if json:
        print_json({"intact": verdict.intact, **dataclasses.asdict(verdict)})
    else:
        for finding in verdict.findings:
            typer.echo(f"{finding.fault:12}{finding.path}: {finding.told}")
        state = "intact" if verdict.intact else "DAMAGED"
        typer.echo(
            f"{store}: {state}; {verdict.marks} marks, {verdict.objects} objects, "
            f"{verdict.bytes / 1e9:.2f} GB checked"
        )
    if not verdict.intact:
        raise typer.Exit(1)


@app.command()
@guarded
def stats(*, store: StorePath, json: Json = False) -> None:
    """Mean, variance, norms, outlier dimensions and non-finite counts of every hookpoint."""
    from mpcache.stats import stats as run

    found = [dataclasses.asdict(one) for one in run(store)]
    if json:
        return print_json(found)
    return print_table(tuple(found[0]) if found else (), found)


@app.command()
@guarded
@from_config(CollectConfig, arguments=("model", "dataset"))
def bench(
    config: CollectConfig,
    repeats: Annotated[int, typer.Option(help="pairs of runs, one more warms up")] = 5,
    json: Json = False,
) -> None:
    """Rows a second of a collection, as a share of the bare truncated forward pass."""
    from mpcache.bench import bench as run

    found = dataclasses.asdict(run(config, repeats))
    return print_json(found) if json else print_table(tuple(found), [found])


def _pairs(content: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in content.items() if value is not None)
