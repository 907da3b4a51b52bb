"""Commands that measure this machine: bench, bench-loader."""

import dataclasses

import typer

from mpcli.arguments import Json
from mpcli.options_from_config import from_config
from mpcli.tables import print_json, print_table
from mptrain.bench.config import LoaderBenchConfig, PursuitBenchConfig


@from_config(PursuitBenchConfig, arguments=("coder", "store"))
def bench(config: PursuitBenchConfig, json: Json = False) -> None:
    from mpcache.bench.hardware import hardware
    from mptrain.bench.pursuit import bench_pursuit as run
    from mptrain.kernels.device import resolve_device

    report = dataclasses.asdict(run(config))
    machine = hardware(resolve_device(config.device))
    if json:
        return print_json({"hardware": machine, "bench": dataclasses.asdict(config), **report})
    typer.echo(
        f"{machine}; ratios and changes are relative to the direct back end on the same rows"
    )
    print_table(tuple(report["methods"][0]), report["methods"])
    return None


@from_config(LoaderBenchConfig, arguments=("store",))
def bench_loader(config: LoaderBenchConfig, json: Json = False) -> None:
    from mpcache.bench.hardware import hardware
    from mptrain.bench.loader import bench_loader as run
    from mptrain.kernels.device import resolve_device

    report = dataclasses.asdict(run(config))
    machine = hardware(resolve_device(config.device))
    if json:
        return print_json({"hardware": machine, "bench": dataclasses.asdict(config), **report})
    typer.echo(f"{machine}; warm cache")
    for table in (report["readings"], [report["mixing"]], report["waiting"]):
        if table:
            print_table(tuple(table[0]), table)
    return None
