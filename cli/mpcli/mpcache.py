"""`mpcache`: collect activations, and look at stores. Stages are imported when a command runs."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mpcache
from mpcache.config import (
    CollectConfig,
    ConvertConfig,
    HookpointsConfig,
    RepairConfig,
    StoreBenchConfig,
)
from mpcache.errors import UsageError
from mpcache.parallel.config import CollectParallelConfig, ParallelConfig
from mpcache.validation import check_printable, printable
from mpcli.errors import guarded, run_app
from mpcli.options import from_config
from mpcli.reports import (
    age,
    document_lines,
    finding_in_full,
    pairs,
    print_findings,
    print_moved,
    print_summary,
)
from mpcli.tables import print_json, print_table

PLACE = "the store's folder, or its s3:// or gs:// URL"

app = typer.Typer(
    help="Run a language model once and keep its activations in a Zarr store.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
ToPath = Annotated[str, typer.Argument(metavar="TO", help="place of the new store")]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help=PLACE)]
JournalPath = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="note there what is sound; again: go on from there"),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def main() -> None:
    """Entry point."""
    run_app(app)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False,
) -> None:
    if show:
        typer.echo(mpcache.__version__)
        raise typer.Exit


@app.command()
@guarded
@from_config(CollectConfig, CollectParallelConfig, arguments=("model", "dataset"))
def collect(
    config: CollectConfig,
    parallel: CollectParallelConfig,
    store: Annotated[str | None, typer.Argument(metavar="[STORE]", help=PLACE)] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="ROOT", help="without STORE: find or make it in this folder or bucket of stores"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Fill a store, or what is missing of it; without STORE, the right one below --root.

    Exit code 1 if parts could not be collected.
    """
    from mpcache.collection.collect import collect as run

    place, config, found = open_storage(store, root, config)
    try:
        done = found or run(config, place, parallel, quiet=False)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; what was committed stays, the same command goes on from there"
        ) from None
    if json:
        print_json(dataclasses.asdict(done))
    else:
        print_summary(done)
    if done.missing:
        raise typer.Exit(1)


def open_storage(
    store: str | None, root: str | None, config: CollectConfig
) -> tuple[Any, CollectConfig, Any]:
    """Where to collect, how, and what is there if that is all that was asked for."""
    if (store is None) == (root is None):
        raise UsageError("name either STORE or --root ROOT, the folder of stores that has it")
    if store is not None:
        check_printable(store)
        return store, config, None
    from mpcache.collection.catalog import find_store

    assert root is not None
    found = find_store(root, config)
    kept = [n for n in ("codec", "chunk_rows") if getattr(found.config, n) != getattr(config, n)]
    if kept:
        told = ", ".join(f"{name} {getattr(found.config, name)}" for name in kept)
        typer.echo(f"{found.place} is there with {told}, which stays", err=True)
    return found.place, found.config, found.done


@app.command()
@guarded
@from_config(HookpointsConfig, arguments=("model",))
def hookpoints(config: HookpointsConfig, json: Json = False) -> None:
    """What can be collected from a model, from its config alone: paths, widths, bytes a row."""
    from mpcache.model.hookpoint_report import find_hookpoints
    from mpcli.hookpoints import print_report

    report = find_hookpoints(config)
    if json:
        return print_json(report.as_json())
    return print_report(report)


@app.command(name="list")
@guarded
def list_stores(
    *,
    root: Annotated[str, typer.Argument(metavar="ROOT", help="folder or bucket of stores")],
    json: Json = False,
) -> None:
    """Model, dataset, hookpoints, rows (also wanted), bytes, completeness and age of all stores."""
    from mpcache.collection.catalog import entries

    found = [dataclasses.asdict(one) for one in entries(root)]
    if json:
        return print_json(found)
    columns = (
        "store",
        "model",
        "dataset",
        "hookpoints",
        "dtype",
        "rows",
        "rows_wanted",
        "bytes",
        "complete",
        "age",
    )
    shown = [{**one, "complete": f"{one['complete']:.0%}", "age": age(one)} for one in found]
    print_table(columns, [one for one in shown if one["fault"] is None])
    for one in found:
        if one["shortfall"]:
            typer.echo(printable(f"warning: {one['store']}: {one['shortfall']}"), err=True)
        if one["fault"] is not None:
            typer.echo(printable(f"warning: {one['store']}: {one['fault']}"), err=True)
    return None


@app.command()
@guarded
@from_config(ParallelConfig)
def copy(parallel: ParallelConfig, store: StorePath, to: ToPath, json: Json = False) -> None:
    """Copy a store, each byte checked on the way; the same command goes on after a stop."""
    from mpcache.maintenance.copy import copy as run

    print_moved("copied", run(store, to, parallel, quiet=json), json)


@app.command()
@guarded
@from_config(ConvertConfig, ParallelConfig)
def convert(
    config: ConvertConfig,
    parallel: ParallelConfig,
    store: StorePath,
    to: ToPath,
    json: Json = False,
) -> None:
    """Rewrite a store in another dtype, codec, chunking or part size, or with some hookpoints."""
    from mpcache.maintenance.convert import convert as run

    print_moved("converted", run(store, to, config, parallel, quiet=json), json)


@app.command()
@guarded
def remove(
    *,
    store: StorePath,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Delete a store for good."""
    from mpcache.maintenance.copy import find_removable
    from mpcache.maintenance.copy import remove as run

    leaving = find_removable(store)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{store} would be deleted for good; say --yes")
        if not typer.confirm(printable(f"delete {leaving.told}, {store}, for good?")):
            raise UsageError(f"{store} stays")
    run(leaving)
    typer.echo(printable(f"{store} is removed"))


@app.command()
@guarded
def info(*, store: StorePath, json: Json = False) -> None:
    """Provenance, hookpoints, rows, bytes and parts done of a store."""
    from mpcache.maintenance.stats import info as run

    found = run(store)
    if json:
        return print_json(found)
    model, dataset = found["provenance"]["model"], found["provenance"]["dataset"]
    typer.echo(f"store        {printable(found['store'])}")
    typer.echo(f"model        {pairs(model)}")
    typer.echo(f"dataset      {pairs(dataset)}")
    typer.echo(f"fingerprint  {found['fingerprint']}")
    for line in document_lines(found):
        typer.echo(line)
    typer.echo(f"planned      {found['rows_planned']:,} rows in {found['parts_planned']} parts")
    typer.echo(f"wanted       {found['rows_wanted']:,} rows")
    if found["shortfall"]:
        typer.echo(f"warning: {found['shortfall']}", err=True)
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
@from_config(ParallelConfig)
def verify(
    parallel: ParallelConfig, store: StorePath, journal: JournalPath = None, json: Json = False
) -> None:
    """Check every byte of a store; exit code 1 if committed data is damaged."""
    from mpcache.maintenance.verify import verify as run

    verdict = run(store, parallel, journal=journal, quiet=json)
    if json:
        findings = [finding_in_full(finding) for finding in verdict.findings]
        told = {**dataclasses.asdict(verdict), "findings": findings}
        print_json({"intact": verdict.intact, **told})
    else:
        print_findings(verdict.findings)
        state = "intact" if verdict.intact else "DAMAGED"
        earlier = f", {verdict.earlier} of the marks earlier" if verdict.earlier else ""
        typer.echo(
            f"{printable(store)}: {state}; {verdict.marks} marks, {verdict.objects} objects, "
            f"{verdict.bytes / 1e9:.2f} GB checked{earlier}"
        )
    if not verdict.intact:
        raise typer.Exit(1)


@app.command()
@guarded
@from_config(RepairConfig, ParallelConfig)
def repair(
    config: RepairConfig, parallel: ParallelConfig, store: StorePath, json: Json = False
) -> None:
    """Verify a store, and collect again what is damaged; exit code 1 if damage is left.

    What comes out equal to what was committed is put back; anything else stays as it is, and is
    told, unless --accept-other-bits is given.
    """
    from mpcache.maintenance.repair import repair as run

    done = run(store, config, parallel, quiet=json)
    if json:
        left = [finding_in_full(finding) for finding in done.left]
        print_json({"intact": done.intact, **dataclasses.asdict(done), "left": left})
    else:
        for name in (*done.metadata, *done.deleted):
            typer.echo(printable(f"{'mended' if name in done.metadata else 'deleted':14}{name}"))
        for one in done.marks:
            typer.echo(printable(f"{one.outcome:14}part {one.part} of {one.array}: {one.told}"))
        print_findings(done.left)
        typer.echo(f"{printable(store)}: {'intact' if done.intact else 'DAMAGED'}")
    if any(one.outcome == "other bits" for one in done.marks):
        typer.echo(
            "error: other bits are computed here; repair where it was collected, name a copy with "
            "--source, or say --accept-other-bits",
            err=True,
        )
    if not done.intact:
        raise typer.Exit(1)


@app.command()
@guarded
@from_config(ParallelConfig)
def stats(
    parallel: ParallelConfig,
    store: StorePath,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write mean and variance per dimension, as safetensors"),
    ] = None,
    json: Json = False,
) -> None:
    """Mean, variance, norms, outlier dimensions and non-finite counts of every hookpoint."""
    from mpcache.maintenance.stats import save_dimensions
    from mpcache.maintenance.stats import stats as run

    found = run(store, parallel, quiet=json)
    if out is not None:
        save_dimensions(found, out)
    told = [dataclasses.asdict(one.stats) for one in found]
    if json:
        return print_json(told)
    return print_table(tuple(told[0]) if told else (), told)


@app.command()
@guarded
@from_config(CollectConfig, arguments=("model", "dataset"))
def bench(
    config: CollectConfig,
    repeats: Annotated[int, typer.Option(help="pairs of runs, one more warms up")] = 5,
    json: Json = False,
) -> None:
    """Rows a second of a collection, as a share of the bare truncated forward pass."""
    from mpcache.bench.collect import bench as run

    found = dataclasses.asdict(run(config, repeats))
    return print_json(found) if json else print_table(tuple(found), [found])


@app.command("bench-store")
@guarded
@from_config(StoreBenchConfig)
def bench_store(
    config: StoreBenchConfig,
    folder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="where to write; default where temporary files go"),
    ] = None,
    json: Json = False,
) -> None:
    """Rows a second that are written and read in this format, beside other ways to keep them."""
    from mpcache.bench.store import HOW_TO_INSTALL
    from mpcache.bench.store import bench_store as run

    report = run(config, folder)
    found = [dataclasses.asdict(one) for one in report.measurements]
    if json:
        return print_json({**dataclasses.asdict(report), "measurements": found})
    typer.echo(f"{report.hardware}; {config.rows:,} rows of {config.width} {config.dtype} values")
    print_table(tuple(found[0]), found)
    for name, why in report.absent.items():
        typer.echo(f"not measured: {name} ({why}); {HOW_TO_INSTALL}")
    return None
