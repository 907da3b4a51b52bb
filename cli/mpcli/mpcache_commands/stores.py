"""Commands on stores as wholes: list, info, remove."""

import dataclasses
import sys
from typing import Annotated

import typer

from mpcache.errors import UsageError
from mpcache.untrusted_names import printable
from mpcli.arguments import Json, StoreArgument
from mpcli.reports import document_lines, format_age, format_pairs
from mpcli.tables import print_json, print_table


def list_stores(
    *,
    root: Annotated[
        str,
        typer.Argument(
            metavar="ROOT", help="folder of stores: a local folder, or an s3:// or gs:// URL"
        ),
    ],
    json: Json = False,
) -> None:
    from mpcache.collection.catalog import list_stores as run

    entries = [dataclasses.asdict(entry) for entry in run(root)]
    if json:
        return print_json(entries)
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
    rows = [
        {**entry, "complete": f"{entry['complete']:.0%}", "age": format_age(entry["age_seconds"])}
        for entry in entries
        if entry["fault"] is None
    ]
    print_table(columns, rows)
    for entry in entries:
        for problem in (entry["shortfall"], entry["fault"]):
            if problem:
                typer.echo(printable(f"warning: {entry['store']}: {problem}"), err=True)
    return None


def info(*, store: StoreArgument, json: Json = False) -> None:
    from mpcache.store.store_info import store_info as run

    report = run(store)
    if json:
        return print_json(report)
    model, dataset = report["provenance"]["model"], report["provenance"]["dataset"]
    typer.echo(f"store        {printable(report['store'])}")
    typer.echo(f"model        {format_pairs(model)}")
    typer.echo(f"dataset      {format_pairs(dataset)}")
    typer.echo(f"fingerprint  {report['fingerprint']}")
    for line in document_lines(report):
        typer.echo(line)
    typer.echo(f"planned      {report['rows_planned']:,} rows in {report['parts_planned']} parts")
    typer.echo(f"wanted       {report['rows_wanted']:,} rows")
    if report["shortfall"]:
        typer.echo(f"warning: {report['shortfall']}", err=True)
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
    return print_table(columns, report["hookpoints"])


def remove(
    *,
    store: StoreArgument,
    yes: Annotated[
        bool, typer.Option("--yes", help="delete without asking for confirmation")
    ] = False,
) -> None:
    from mpcache.maintenance.remove import plan_removal
    from mpcache.maintenance.remove import remove as run

    removal = plan_removal(store)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                f"cannot ask for confirmation to delete {store}: the input is not a terminal; "
                "give --yes to delete the store for good"
            )
        if not typer.confirm(printable(f"delete {removal.description}, {store}, for good?")):
            raise UsageError(f"{store} was not deleted: the answer was not yes")
    run(removal)
    typer.echo(printable(f"{store} was deleted"))
