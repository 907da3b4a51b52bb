"""Commands that measure this machine: bench, bench-store."""

import dataclasses
from typing import Annotated

import typer

from mpcache.config import CollectConfig, StoreBenchConfig
from mpcli.arguments import Json
from mpcli.options import from_config
from mpcli.tables import print_json, print_table


@from_config(CollectConfig, arguments=("model", "dataset"))
def bench(
    config: CollectConfig,
    repeats: Annotated[int, typer.Option(help="pairs of runs, one more warms up")] = 5,
    json: Json = False,
) -> None:
    from mpcache.bench.collect import bench as run

    found = dataclasses.asdict(run(config, repeats))
    return print_json(found) if json else print_table(tuple(found), [found])


@from_config(StoreBenchConfig)
def bench_store(
    config: StoreBenchConfig,
    folder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="where to write; default where temporary files go"),
    ] = None,
    json: Json = False,
) -> None:
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
