"""Commands that train coders: fit, save-coders, presets."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcli.arguments import Json
from mpcli.errors import warnings_in_words
from mpcli.options import LoadConfigFrom, from_config, option
from mpcli.tables import print_json, print_table
from mptrain.config.fit import FitConfig
from mptrain.config.run import RunConfig

_RESULTS = (
    "coder",
    "fvu",
    "fvu_all",
    "l0",
    "dead_share",
    "rows_trained",
    "rows_per_second",
    "train_seconds",
)
_NEEDS = ("name", "latents", "parameters", "weights_bytes", "optimizer_bytes", "step_bytes")


def _resumed(run: str, given: dict[str, Any]) -> RunConfig:
    from mptrain.runs.run_dir import resumed_config

    return resumed_config(run, given)


@from_config(
    FitConfig,
    arguments=("store",),
    first={
        "hookpoints": "layers.10,layers.10.mlp",
        "run": "runs/first",
        "kind": "sae,transcoder",
        "arch": "mp,topk",
        "k": "32,64",
        "expansion": "16",
        "rows": "10M",
        "lr": "1e-3,2e-3",
    },
    load_from=LoadConfigFrom(
        name="resume",
        metavar="RUN",
        doc="continue the run in this folder with the config that it was started with",
        load=_resumed,
    ),
)
def fit(
    config: RunConfig,
    *,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="print the plan of the run (coders, memory, passes) and do nothing else",
        ),
    ] = False,
    json: Json = False,
) -> None:
    from mptrain.runs.fit import fit as run
    from mptrain.training.distributed import is_first_process

    if not is_first_process():
        if not dry_run:
            run(config)
        return None
    for warning in config.warnings():
        typer.echo(f"warning: {warning}", err=True)
    if dry_run:
        return _print_plan(config, json)
    try:
        with warnings_in_words():
            results = run(config, quiet=False)
    except KeyboardInterrupt as stop:
        raise type(stop)(_how_to_go_on(Path(config.run))) from None
    for warning in (warning for result in results for warning in result.get("warnings", ())):
        typer.echo(f"warning: {warning}", err=True)
    if json:
        print_json(results)
    else:
        _tell_results(Path(config.run), results)
    if all(result["diverged"] for result in results):
        typer.echo("error: all coders diverged, and none is saved; use a lower --lr", err=True)
        raise typer.Exit(1)
    return None


def _tell_results(run: Path, results: list[dict[str, Any]]) -> None:
    trained = [result for result in results if not result["diverged"]]
    if trained:
        unevaluated = dict.fromkeys(_RESULTS)
        rows = [{**unevaluated, **one, **(one["validation"] or {})} for one in trained]
        print_table(_RESULTS, rows)
        typer.echo(f"coders in {run}/coders, this table in {run}/results.json")


def _print_plan(config: RunConfig, json: bool) -> None:
    from mptrain.runs.fit import plan_fit

    plan = plan_fit(config)
    if json:
        return print_json(dataclasses.asdict(plan))
    number = {name: n for n, names in enumerate(plan.passes, 1) for name in names}
    rows = [{**dataclasses.asdict(one), "pass": number[one.name]} for one in plan.needs]
    print_table((*_NEEDS, "pass"), rows)
    memory = {**plan.memory_bytes, "in all": sum(plan.memory_bytes.values())}
    print_table(("memory", "MB"), [{"memory": k, "MB": v / 1e6} for k, v in memory.items()])
    return typer.echo(
        f"passes: {len(plan.passes)}, each of {plan.train_steps} train steps "
        f"({plan.epochs:.3g} epochs) on {plan.device}; {plan.read_bytes / 1e9:.3g} GB to read"
        f"{_cache_note(config, plan.store_bytes)}; nothing was written"
    )


def _cache_note(config: RunConfig, store_bytes: int) -> str:
    if config.cache_dir is None:
        return ""
    return (
        f", {store_bytes / 1e9:.3g} GB of it from {config.store}, the rest from {config.cache_dir}"
    )


def _how_to_go_on(run: Path) -> str:
    from mptrain.runs.saved_state import last_step

    step = last_step(run)
    if step is None:
        return "interrupted before a state was saved; the same command starts anew"
    return (
        f"interrupted; the same command goes on after train step {step}, saved in {run}/state; "
        f"mptrain save-coders {run} makes coders of that state"
    )


def save_coders(
    *,
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run that has not ended")],
    store: Annotated[
        str | None, typer.Option(help="where its store is now [default: where it was]")
    ] = None,
    device: Annotated[str, typer.Option(help="torch device to use")] = "cpu",
    json: Json = False,
) -> None:
    """The run may be under way or interrupted; nothing of it changes, and it may go on later."""
    from mptrain.runs.save_coders import save_coders as run_it

    places = {"device": device} if store is None else {"device": device, "store": store}
    saved = run_it(run, places)
    for one in saved:
        if one["diverged"]:
            typer.echo(f"warning: {one['coder']} has diverged and is not saved", err=True)
    if json:
        return print_json(saved)
    for one in saved:
        if not one["diverged"]:
            typer.echo(f"{one['folder']}: after {one['step']:,} of {one['steps']:,} train steps")
    if not saved:
        typer.echo(f"the coders of the last saved state are finished; they are in {run}/coders")
    return None


def presets(json: Json = False) -> None:
    from mptrain.config.presets import PRESETS

    if json:
        return print_json({name: dict(changes) for name, changes in PRESETS.items()})
    for name, changes in PRESETS.items():
        told = " ".join(option(*change) for change in changes.items())
        typer.echo(f"{name:18s}{told or '(the defaults)'}")
    return None
