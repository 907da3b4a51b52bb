"""Compare the store format with Zarr, zarrs and the cache of SAELens on the same random rows.

\b
    python -m benchmarks.compare_storage
    python -m benchmarks.compare_storage --rows 1M --width 768 --tools zarr --json

Rows per second that are written and read. Each layout of the store format is compared with Zarr's
own writes and reads of the same layout.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import typer

from benchmarks.tool_imports import HOW_TO_INSTALL, show_progress
from mpcache.bench.config import StoreBenchConfig
from mpcli.errors import guarded, run_app
from mpcli.options_from_config import from_config
from mpcli.tables import print_json, print_table

Tool = Literal["zarr", "zarrs", "sae-lens"]
_ZARRS_PIPELINE = "zarrs.ZarrsCodecPipeline"


@dataclass(frozen=True, kw_only=True)
class ToolOptions:
    """The tools to compare with."""

    tools: tuple[Tool, ...] = get_args(Tool)
    "tools to measure"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(help=__doc__)
@guarded
@from_config(StoreBenchConfig, ToolOptions)
def compare(
    config: StoreBenchConfig,
    options: ToolOptions,
    folder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="where to write; default: where temporary files go"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure all tools; the docstring of the module is the help."""
    show_progress("loading torch")
    from benchmarks.other_storage import saelens_cache, zarr_arrays
    from mpcache.bench.storage_speed import (
        Case,
        measure_case,
        measure_cases,
        plain_case,
        store_cases,
    )

    own = store_cases(config)
    cases, absent = [*own, plain_case(config)], dict[str, str]()
    for tool in options.tools:
        show_progress(f"loading {tool}")
        try:
            if tool == "sae-lens":
                cases.append(Case(saelens_cache(), own[0].spec))
            else:
                pipeline = _ZARRS_PIPELINE if tool == "zarrs" else None
                cases += [
                    Case(zarr_arrays(case.spec, config.threads, pipeline), case.spec)
                    for case in own
                ]
        except ModuleNotFoundError as error:
            absent[tool] = f"there is no module {error.name}"

    def measure_with_progress(case: Case, *arguments: Any) -> Any:
        show_progress(f"measuring {case.method.name}")
        return measure_case(case, *arguments)

    report = measure_cases(cases, config, folder, measure_with_progress)
    rows = [dataclasses.asdict(measurement) for measurement in report.measurements]
    show_progress("")
    if json:
        return print_json({"hardware": report.hardware, "measurements": rows, "absent": absent})
    typer.echo(f"{report.hardware}; {config.rows:,} rows of {config.width} {config.dtype} values")
    print_table(tuple(rows[0]), rows)
    for name, reason in absent.items():
        typer.echo(f"not measured: {name} ({reason}); {HOW_TO_INSTALL}")
    return None


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
