"""Compare our coders with SAELens, overcomplete and sparsify on the same rows and dictionary.

\b
    python -m benchmarks.compare_coders
    python -m benchmarks.compare_coders --tools sae-lens --device cuda --json

Speed, memory for the backward pass, peak memory, and agreement with exact matching pursuit. Our own
coders are measured beside the other tools, on the same rows and in the same rounds.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import typer

from benchmarks.tool_imports import HOW_TO_INSTALL, show_progress
from mpcli.errors import guarded, run_app
from mpcli.options_from_config import from_config
from mpcli.tables import print_json, print_table
from mptrain.bench.config import PursuitBenchConfig

Tool = Literal["sae-lens", "overcomplete", "eai-sparsify"]
TOOLS = get_args(Tool)


@dataclass(frozen=True, kw_only=True)
class ToolOptions:
    """The tools to compare with, and on how many rows."""

    tools: tuple[Tool, ...] = TOOLS
    "tools to measure"
    tool_rows: int = 256
    "rows coded with these tools; some keep every pursuit step: overcomplete 5 MB per row"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(help=__doc__)
@guarded
@from_config(PursuitBenchConfig, ToolOptions)
def compare(
    config: PursuitBenchConfig,
    options: ToolOptions,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure all tools; the docstring of the module is the help."""
    show_progress("loading torch")
    from benchmarks.other_coder_adapters import find_methods
    from mpcache.bench.hardware import hardware
    from mptrain.bench.pursuit import bare_products, make_tensors, measure_methods, own_methods

    config = dataclasses.replace(config, rows=min(config.rows, options.tool_rows))
    show_progress("making rows and dictionary")
    x_BD, direct = make_tensors(config)
    show_progress(f"loading {', '.join(options.tools)}")
    dictionary, bias = direct.decoder_ME.detach(), direct.b_D.detach()
    others, absent = find_methods(options.tools, dictionary, bias, config.k)
    methods = [*own_methods(config, direct), *others, bare_products(direct)]
    measurements = measure_methods(methods, x_BD, direct, config.repeats, show_progress)
    rows = [dataclasses.asdict(measurement) for measurement in measurements]
    show_progress("")
    if json:
        settings = dataclasses.asdict(config)
        machine = hardware(x_BD.device)
        return print_json(
            {"hardware": machine, "bench": settings, "methods": rows, "absent": absent}
        )
    typer.echo(f"{hardware(x_BD.device)}; ratios and changes compare with direct on the same rows")
    print_table(tuple(rows[0]), rows)
    for name, reason in absent.items():
        typer.echo(f"not measured: {name} ({reason}); {HOW_TO_INSTALL}")
    return None


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
