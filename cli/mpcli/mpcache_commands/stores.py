"""Commands on stores as wholes: list, info, remove."""

import dataclasses
import sys
from typing import Annotated

import typer

from mpcache.errors import UsageError
from mpcache.validation import printable
from mpcli.arguments import Json, StoreArgument
from mpcli.reports import age, document_lines, pairs
from mpcli.tables import print_json, print_table


def list_stores(
    *,
    root: Annotated[str, typer.Argument(metavar="ROOT", help="folder or bucket of stores")],
    json: Json = False,
) -> None:
    from mpcache.collection.catalog import list_stores as run

    found = [dataclasses.asdict(entry) for entry in run(root)]
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


def info(*, store: StoreArgument, json: Json = False) -> None:
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


def remove(
    *,
    store: StoreArgument,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
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
