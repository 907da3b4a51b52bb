"""Compare our loader with SAELens' reader of its own cache, on rows of the same store.

\b
    python -m benchmarks.compare_loaders STORE
    python -m benchmarks.compare_loaders STORE --rows 3M --saelens-rows 500k --json

Rows per second, on a warm cache. SAELens reads a copy of the store's first rows, which it keeps as
float32 in Arrow, in order and in mixed order.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.tool_imports import HOW_TO_INSTALL, show_progress
from mpcli.errors import guarded, run_app
from mpcli.options_from_config import from_config
from mpcli.tables import print_json, print_table
from mpcli.values import count
from mptrain.bench.config import LoaderBenchConfig

SAELENS_ROWS = "200k"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(help=__doc__)
@guarded
@from_config(LoaderBenchConfig, arguments=("store",))
def compare(
    config: LoaderBenchConfig,
    *,
    saelens_rows: Annotated[
        int, typer.Option(parser=count, metavar="COUNT", help="rows in the cache of SAELens")
    ] = SAELENS_ROWS,  # type: ignore[assignment]  # parsed by Typer
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure both readers; the docstring of the module is the help."""
    show_progress("loading torch")
    from benchmarks.saelens_reader import saelens_reads
    from mpcache.bench.hardware import hardware
    from mptrain.bench.loader import first_rows, measure_reads, output_sides, own_reads
    from mptrain.data.loader import open_store
    from mptrain.kernels.device import resolve_device

    store = open_store(config.store, config.cache_dir)
    sides = output_sides(config, store)
    if len(sides) > 1:
        raise typer.BadParameter(
            f"hookpoints must be a single one here, got {len(sides)}: SAELens caches one hookpoint"
        )
    reads, reason = own_reads(config, store, sides), None
    with tempfile.TemporaryDirectory() as folder:
        show_progress("writing the cache of SAELens")
        try:
            x_ND = first_rows(config, store, sides[0], saelens_rows)
            reads |= saelens_reads(x_ND, store.ctx_len, Path(folder))
        except ModuleNotFoundError as error:
            reason = f"there is no module {error.name}"
        speeds = measure_reads(config, reads, show_progress)
    rows = [dataclasses.asdict(speed) for speed in speeds]
    show_progress("")
    machine = hardware(resolve_device(config.device))
    if json:
        settings = dataclasses.asdict(config)
        return print_json(
            {"hardware": machine, "bench": settings, "readings": rows, "absent": reason}
        )
    typer.echo(f"{machine}; warm cache")
    print_table(tuple(rows[0]), rows)
    if reason:
        typer.echo(f"not measured: SAELens ({reason}); {HOW_TO_INSTALL}")
    return None


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
