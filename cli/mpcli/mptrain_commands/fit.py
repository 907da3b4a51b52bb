"""Commands that train coders: fit, save-coders, presets."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpcache.errors import UsageError
from mpcli.arguments import Json
from mpcli.errors import warnings_in_words
from mpcli.options_from_config import LoadConfigFrom, from_config
from mpcli.tables import print_json, print_table
from mpcli.values import option
from mptrain.config.coder_grid import FitConfig
from mptrain.config.run import RunConfig

if TYPE_CHECKING:  # it imports torch, which --help must not
    from mptrain.runs.results import CoderResult

_RESULT_COLUMNS = (
    "coder",
    "fvu",
    "fvu_all",
    "l0",
    "dead_share",
    "rows_trained",
    "rows_per_second",
    "train_seconds",
    "gain_of_doubling",
)
_TRIAL_COLUMNS = ("value", "choice_fvu", "report_fvu", "l0", "dead_share", "round", "best")
_CODER_COLUMNS = ("name", "latents", "parameters", "weights_bytes", "optimizer_bytes", "step_bytes")


def _resume(run: str, given: dict[str, Any]) -> RunConfig:
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
        doc="folder of an earlier run; continue that run with its own config",
        load=_resume,
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
    tune: Annotated[
        str | None,
        typer.Option(
            "--tune",
            metavar="SETTING,...",
            rich_help_panel="Optimizer",
            help=(
                "train each coder at several values of lr, auxk-alpha, sparsity-weight or "
                "bandwidth, until the best value has a worse one on each side; several settings "
                "are tuned one after the other; example: --tune lr,auxk-alpha"
            ),
        ),
    ] = None,
    json: Json = False,
) -> None:
    from mptrain.runs.fit import fit as run
    from mptrain.training.distributed import is_first_process

    if tune is not None:
        return _tune(config, tune, dry_run, json)
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
        raise type(stop)(_how_to_continue(Path(config.run))) from None
    return _report(config, results, json)


def _report(config: RunConfig, results: "list[CoderResult]", json: bool) -> None:
    from mptrain.tuning.given_rates import edge_warnings

    of_results = (warning for result in results for warning in result.warnings)
    for warning in (*of_results, *edge_warnings(config.coders(), results)):
        typer.echo(f"warning: {warning}", err=True)
    if json:
        print_json([result.to_json() for result in results])
    else:
        _print_results(Path(config.run), results)
    if all(result.diverged for result in results):
        typer.echo("error: all coders diverged, so no coder was saved; use a lower --lr", err=True)
        raise typer.Exit(1)


def _tune(config: RunConfig, settings: str, dry_run: bool, json: bool) -> None:
    from mptrain.tuning.tune import tune

    if dry_run or not isinstance(config, FitConfig):
        other = "--dry-run" if dry_run else "--resume with a list of coders"
        raise UsageError(f"--tune cannot be combined with {other}; remove one of them")
    for warning in config.warnings():
        typer.echo(f"warning: {warning}", err=True)
    names = tuple(name.strip().replace("-", "_") for name in settings.split(","))
    try:
        with warnings_in_words():
            tuned = tune(config, names, quiet=False)
    except KeyboardInterrupt as stop:
        message = "interrupted; run the same command again to continue the search"
        raise type(stop)(message) from None
    if json:
        return print_json([search.to_json() for search in tuned])
    for search in tuned:
        typer.echo(f"{search.setting} of {search.name}:")
        rows = [
            {**dataclasses.asdict(trial), "best": "best" if trial == search.best else ""}
            for trial in search.trials
        ]
        print_table(_TRIAL_COLUMNS, rows)
        if search.at_edge:
            typer.echo(
                f"warning: the best {search.setting} of {search.name} is at the edge of what was "
                "tried; a value beyond it may be better",
                err=True,
            )
    passes = len({(trial.setting, trial.round) for s in tuned for trial in s.trials})
    typer.echo(f"{passes} passes over the store; all values are in {config.run}/tuning.json")
    for folder in dict.fromkeys(
        search.best.folder for search in {s.name: s for s in tuned}.values()
    ):
        typer.echo(f"best coder: {folder}")
    return None


def _print_results(run: Path, results: "list[CoderResult]") -> None:
    from mptrain.runs.convergence import describe_convergence

    trained = [result.to_json() for result in results if not result.diverged]
    if trained:
        unevaluated = dict.fromkeys(_RESULT_COLUMNS)
        rows = [
            {**unevaluated, **row, **(row["validation"] or {}), **(row["convergence"] or {})}
            for row in trained
        ]
        print_table(_RESULT_COLUMNS, rows)
        if text := describe_convergence([r.convergence for r in results if not r.diverged]):
            typer.echo(text)
        typer.echo(f"the coders are in {run}/coders, and this table is in {run}/results.json")


def _print_plan(config: RunConfig, json: bool) -> None:
    from mptrain.runs.fit import plan_fit

    plan = plan_fit(config)
    if json:
        return print_json(dataclasses.asdict(plan))
    number = {name: n for n, names in enumerate(plan.passes, 1) for name in names}
    rows = [{**dataclasses.asdict(coder), "pass": number[coder.name]} for coder in plan.coders]
    print_table((*_CODER_COLUMNS, "pass"), rows)
    memory = {**plan.memory_bytes, "total": sum(plan.memory_bytes.values())}
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


def _how_to_continue(run: Path) -> str:
    from mptrain.runs.saved_state import last_step

    step = last_step(run)
    if step is None:
        return "interrupted before a state was saved; run the same command again to start over"
    return (
        f"interrupted; run the same command again to continue after train step {step} (state in "
        f"{run}/state); `mptrain save-coders {run}` saves the coders as of that step"
    )


def save_coders(
    *,
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run that is not finished")],
    store: Annotated[
        str | None,
        typer.Argument(
            metavar="STORE", help="new location of the run's store, if the store has moved"
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="torch device that computes the thresholds of batch-mp and batch-topk coders, "
            "such as cpu or cuda:1",
        ),
    ] = "cpu",
    json: Json = False,
) -> None:
    """The coders are saved as RUN/coders/NAME-stepN. The run may be running or interrupted. The
    command does not change the run, which can continue later.
    """
    from mptrain.runs.save_coders_early import save_coders as save

    changes = {"device": device} if store is None else {"device": device, "store": store}
    saved = save(run, changes)
    for coder in saved:
        if coder.diverged:
            typer.echo(
                f"warning: {coder.coder} diverged, so it was not saved; use a lower --lr", err=True
            )
    if json:
        return print_json([dataclasses.asdict(coder) for coder in saved])
    for coder in saved:
        if not coder.diverged:
            steps = f"after {coder.step:,} of {coder.steps:,} train steps"
            typer.echo(f"{coder.folder}: {steps}")
    if not saved:
        typer.echo(f"all coders of the last saved state are finished; they are in {run}/coders")
    return None


def presets(json: Json = False) -> None:
    from mptrain.config.presets import PRESETS

    if json:
        return print_json({name: dict(changes) for name, changes in PRESETS.items()})
    for name, changes in PRESETS.items():
        options = " ".join(option(*change) for change in changes.items())
        typer.echo(f"{name:18s}{options or '(the defaults)'}")
    return None
