"""Commands that measure this machine: bench, bench-store."""

import dataclasses
from typing import Annotated

import typer

from mpcache.bench.config import StoreBenchConfig
from mpcache.config import CollectConfig
from mpcli.arguments import Json
from mpcli.options_from_config import from_config
from mpcli.tables import print_json, print_table


@from_config(CollectConfig, arguments=("model", "dataset"))
def bench(
    config: CollectConfig,
    repeats: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            help="measured pairs of runs (the model alone, and a collection); one more pair before "
            "them is a warm-up",
        ),
    ] = 5,
    json: Json = False,
) -> None:
    from mpcache.bench.collect import bench as run

    row = dataclasses.asdict(run(config, repeats))
    return print_json(row) if json else print_table(tuple(row), [row])


@from_config(StoreBenchConfig)
def bench_store(
    config: StoreBenchConfig,
    folder: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="folder for the stores that are measured; default: the system's temporary folder",
        ),
    ] = None,
    json: Json = False,
) -> None:
    from mpcache.bench.storage_speed import bench_store as run

    report = run(config, folder)
    rows = [dataclasses.asdict(measurement) for measurement in report.measurements]
    if json:
        return print_json({"hardware": report.hardware, "measurements": rows})
    typer.echo(f"{report.hardware}; {config.rows:,} rows of {config.width} {config.dtype} values")
    return print_table(tuple(rows[0]), rows)
