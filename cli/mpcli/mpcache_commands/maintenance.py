"""Commands that read every part of a store: verify, repair, stats, copy, convert."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mpcache.config import ConvertConfig, RepairConfig
from mpcache.errors import UsageError
from mpcache.parallel.config import ParallelConfig
from mpcache.untrusted_names import printable
from mpcli.arguments import Json, StoreArgument, TargetArgument
from mpcli.options_from_config import from_config
from mpcli.reports import finding_as_json, print_copy, print_findings
from mpcli.tables import print_json, print_table

JournalPath = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="file that records which data is intact; a later verify with the same file skips the "
        "data recorded there",
    ),
]


@from_config(ParallelConfig)
def verify(
    parallel: ParallelConfig, store: StoreArgument, journal: JournalPath = None, json: Json = False
) -> None:
    from mpcache.maintenance.verify import verify as run

    verdict = run(store, parallel, journal=journal, quiet=json)
    if json:
        findings = [finding_as_json(finding) for finding in verdict.findings]
        print_json({"intact": verdict.intact, **dataclasses.asdict(verdict), "findings": findings})
    else:
        print_findings(verdict.findings)
        state = "intact" if verdict.intact else "DAMAGED"
        earlier = (
            f"; {verdict.earlier} of the marks were checked earlier" if verdict.earlier else ""
        )
        typer.echo(
            f"{printable(store)}: {state}; {verdict.marks} marks, {verdict.objects} objects, "
            f"{verdict.bytes / 1e9:.2f} GB checked{earlier}"
        )
    if not verdict.intact:
        raise typer.Exit(1)


@from_config(RepairConfig, ParallelConfig)
def repair(
    config: RepairConfig, parallel: ParallelConfig, store: StoreArgument, json: Json = False
) -> None:
    """The model computes damaged rows again; with --source, they are read from another store. Only
    rows that equal the rows first stored are written, unless --accept-other-bits is given.
    """
    from mpcache.maintenance.repair import repair as run

    done = run(store, config, parallel, quiet=json)
    if json:
        left = [finding_as_json(finding) for finding in done.left]
        print_json({"intact": done.intact, **dataclasses.asdict(done), "left": left})
    else:
        for name in (*done.metadata, *done.deleted):
            typer.echo(printable(f"{'restored' if name in done.metadata else 'deleted':14}{name}"))
        for mark in done.marks:
            line = f"{mark.outcome:14}part {mark.part} of {mark.array}: {mark.reason}"
            typer.echo(printable(line))
        print_findings(done.left)
        typer.echo(f"{printable(store)}: {'intact' if done.intact else 'DAMAGED'}")
    if any(mark.outcome == "other bits" for mark in done.marks):
        typer.echo(
            "error: the rows that this machine computes differ in some bits from the rows first "
            "stored; repair on the machine that collected the store, give a copy of the store "
            "with --source, or accept the new rows with --accept-other-bits",
            err=True,
        )
    if not done.intact:
        raise typer.Exit(1)


@from_config(ParallelConfig)
def stats(
    parallel: ParallelConfig,
    store: StoreArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="also write the mean and variance of each dimension to this safetensors file",
        ),
    ] = None,
    json: Json = False,
) -> None:
    from mpcache.maintenance.stats import save_dimensions
    from mpcache.maintenance.stats import stats as run

    if out is not None and not out.parent.is_dir():  # known before the work, which takes long
        raise UsageError(f"--out must be in a folder that exists, got {out}; make {out.parent}")
    sides = run(store, parallel, quiet=json)
    if out is not None:
        save_dimensions(sides, out)
    rows = [dataclasses.asdict(side.stats) for side in sides]
    if json:
        return print_json(rows)
    return print_table(tuple(rows[0]) if rows else (), rows)


@from_config(ParallelConfig)
def copy(
    parallel: ParallelConfig, store: StoreArgument, to: TargetArgument, json: Json = False
) -> None:
    from mpcache.maintenance.copy import copy as run

    print_copy("copied", run(store, to, parallel, quiet=json), json)


@from_config(ConvertConfig, ParallelConfig)
def convert(
    config: ConvertConfig,
    parallel: ParallelConfig,
    store: StoreArgument,
    to: TargetArgument,
    json: Json = False,
) -> None:
    from mpcache.maintenance.convert import convert as run

    print_copy("converted", run(store, to, config, parallel, quiet=json), json)
