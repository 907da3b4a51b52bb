"""`mpcache hookpoints`, and its report for people."""

from collections.abc import Sequence
from typing import Any

import typer

from mpcache.config import HookpointsConfig
from mpcache.untrusted_names import printable
from mpcli.arguments import Json
from mpcli.options_from_config import from_config
from mpcli.tables import print_json, print_table

_COLUMNS = ("hookpoint", "*", "input", "output", "bytes per row", "module")


@from_config(HookpointsConfig, arguments=("model",))
def hookpoints(config: HookpointsConfig, json: Json = False) -> None:
    from mpcache.model import hookpoint_report

    report = hookpoint_report.hookpoints(**vars(config))
    if json:
        return print_json(report.as_json())
    return print_report(report)


def print_report(report: Any) -> None:
    """Print what can be collected, the usual hookpoints, and what cannot be collected."""
    typer.echo(
        printable(f"{report.model}: {report.model_class}, attention {report.attention}; ")
        + "widths, and bytes per row in bfloat16"
    )
    if report.has_no_sdpa:
        typer.echo(
            f"mpcache collect needs --attention {report.attention}: the model does not support sdpa"
        )
    rows = [_row(point) for point in report.hookpoints if point.input or point.output]
    print_table(_COLUMNS, rows, left=("hookpoint", "*", "module"))
    if report.roles:
        typer.echo("\nusual hookpoints")
        roles = [{"role": f"  {role.role}", "side": role.side} for role in report.roles]
        print_table(("role", "side"), roles, left=("role", "side"), head=False)
    refused = _refused(report.hookpoints)
    if refused:
        typer.echo("\ncannot be collected")
    for reason, sides in refused.items():
        typer.echo(printable(f"  {', '.join(sides)}: {reason}"))


def _row(hookpoint: Any) -> dict[str, Any]:
    sizes = [size for size in (hookpoint.input_bytes, hookpoint.output_bytes) if size]
    return {
        "hookpoint": hookpoint.hookpoint,
        "*": hookpoint.numbers,
        "input": hookpoint.input,
        "output": hookpoint.output,
        "bytes per row": " + ".join(f"{size:,}" for size in sizes),
        "module": hookpoint.module,
    }


def _refused(hookpoints: Sequence[Any]) -> dict[str, list[str]]:
    """Sides by the reason for refusal; of nested modules that do not run, only the outermost."""
    reasons: dict[str, list[str]] = {}
    idle = {point.hookpoint for point in hookpoints if point.is_idle}
    for point in hookpoints:
        if point.is_idle and point.hookpoint.rpartition(".")[0] in idle:
            continue
        input_, output = point.input_reason, point.output_reason
        if input_ is not None and (point.is_idle or input_ == output):
            reasons.setdefault(input_, []).append(point.hookpoint)
            continue
        for side, reason in (("input", input_), ("output", output)):
            if reason is not None:
                reasons.setdefault(reason, []).append(f"{point.hookpoint}:{side}")
    return {reason: list(dict.fromkeys(names)) for reason, names in reasons.items()}
