"""`mptrain`: train coders from a store, evaluate and draw them. Stages are imported when run."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from mpcache.errors import UsageError
from mpcli.errors import guarded, run_app, warnings_in_words
from mpcli.options import LoadConfigFrom, choices, count, counts, field_docs, from_config, option
from mpcli.spliced import spliced_figures
from mpcli.tables import print_json, print_table
from mptrain.bench.config import LoaderBenchConfig, PursuitBenchConfig
from mptrain.config.coder import Codes
from mptrain.config.fit import FitConfig
from mptrain.config.run import RunConfig

app = typer.Typer(
    help="Train matching-pursuit and TopK coders from a store of activations.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run model code that comes with the model")
]
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
_OF_A_RUN = field_docs(RunConfig)
_NEEDS = ("name", "latents", "parameters", "weights_bytes", "optimizer_bytes", "step_bytes")


def main() -> None:
    """Entry point."""
    run_app(app)


def _resumed(run: str, given: dict[str, Any]) -> RunConfig:
    from mptrain.runs.run_dir import resumed_config

    return resumed_config(run, given)


@app.command()
@guarded
@from_config(
    FitConfig,
    arguments=("store",),
    instead=LoadConfigFrom(
        name="resume",
        metavar="RUN",
        doc="go on with the run in this folder, by the config it was begun with",
        load=_resumed,
    ),
)
def fit(
    config: RunConfig,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be done, and do nothing")
    ] = False,
    json: Json = False,
) -> None:
    """Train one coder, or a grid of them in one pass over the store."""
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


@app.command()
@guarded
def presets(json: Json = False) -> None:
    """The variants that `fit --preset` knows, and the options that each of them sets."""
    from mptrain.config.presets import PRESETS

    if json:
        return print_json({name: dict(changes) for name, changes in PRESETS.items()})
    for name, changes in PRESETS.items():
        told = " ".join(option(*change) for change in changes.items())
        typer.echo(f"{name:18s}{told or '(the defaults)'}")
    return None


@app.command()
@guarded
def sweep(
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="experiment file, TOML")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="figures, or panels as FIGURE/HOOKPOINT-KIND-kK; * is a wildcard"),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="in place of what the file says"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """A whole experiment file: collect what is missing, train its coders, draw its figures."""
    from mpcli.sweep import collect, forecast, read, settings_of

    experiment, config = read(file, changes or ())
    if trust_remote_code:
        config = dataclasses.replace(config, trust_remote_code=True)
    if dry_run:
        return _tell_forecast(forecast(experiment, config, only or ()), json)
    from mpcache.bench.hardware import hardware
    from mptrain.experiments.sweep import sweep as run
    from mptrain.kernels.device import resolve_device

    try:
        with warnings_in_words():
            outcome = run(
                experiment,
                only or (),
                settings_of(config),
                collect=functools.partial(collect, experiment, config),
                hardware=hardware(resolve_device(experiment.fit["device"])),
                quiet=False,
            )
    except KeyboardInterrupt as stop:
        raise type(stop)("interrupted; the same command goes on from there") from None
    for warning in outcome.warnings:
        typer.echo(f"warning: {warning}", err=True)
    rows = [dataclasses.asdict(verdict) for verdict in outcome.verdicts]
    if json:
        print_json({"verdicts": rows, "files": list(map(str, outcome.files))})
    else:
        print_table(tuple(rows[0]), rows)
        typer.echo(f"figures, tables and captions in {experiment.head.run}/figures")
    if outcome.faults:
        raise UsageError("; ".join(outcome.faults))
    return None


def _tell_forecast(found: dict[str, Any], json: bool) -> None:
    if json:
        return print_json(found)
    seconds = found["train_seconds"]
    time = "unknown: nothing like it is measured yet" if seconds is None else f"{seconds:,.0f} s"
    sides = "1 side" if found["sides"] == 1 else f"{found['sides']} sides"
    typer.echo(
        f"store     {found['rows_collected']:,} rows of {sides}, "
        f"{found['store_bytes'] / 1e9:,.2f} GB; {found['train_rows']:,} rows to train on\n"
        f"panels    {' '.join(found['panels'])}\n"
        f"coders    {found['coders_left']} to train, of {found['coders']}, on "
        f"{found['rows_trained']:,} rows each, {found['epochs']:.2f} epochs; "
        f"{found['coders_bytes'] / 1e9:,.2f} GB\n"
        f"passes    {found['passes']}\n"
        f"memory    {found['memory_bytes'] / 1e9:,.2f} GB for the coders of a pass\n"
        f"time      {time}, of train steps alone\n"
        "nothing was written"
    )
    return None


def _how_to_go_on(run: Path) -> str:
    from mptrain.runs.saved_state import last_step

    step = last_step(run)
    if step is None:
        return "interrupted before a state was saved; the same command starts anew"
    return (
        f"interrupted; the same command goes on after train step {step}, saved in {run}/state; "
        f"mptrain save-coders {run} makes coders of that state"
    )


@app.command()
@guarded
def save_coders(
    *,
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run that has not ended")],
    store: Annotated[
        str | None, typer.Option(help="where its store is now [default: where it was]")
    ] = None,
    device: Annotated[str, typer.Option(help="torch device to use")] = "cpu",
    json: Json = False,
) -> None:
    """Save the coders of a run's last saved state, as RUN/coders/NAME-stepN.

    The run may be under way or interrupted; nothing of it changes, and it may go on later.
    """
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


@app.command(name="eval")
@guarded
def evaluate(
    *,
    coder: Annotated[Path, typer.Argument(metavar="CODER", help="folder RUN/coders/NAME")],
    store: Annotated[str, typer.Argument(metavar="STORE", help="the store's folder or URL")],
    k: Annotated[
        list[str] | None, typer.Option(help="evaluate at these K too", metavar="COUNT,..")
    ] = None,
    codes: Annotated[
        list[str] | None,
        typer.Option(help="mp: with values by these codes too: mp, gp, omp", metavar="CODES,.."),
    ] = None,
    rows: Annotated[int | None, typer.Option(parser=count, help="rows [default: all]")] = None,
    cache_dir: Annotated[str | None, typer.Option(help=_OF_A_RUN["cache_dir"])] = None,
    cache_bytes: Annotated[
        int | None, typer.Option(parser=count, help=_OF_A_RUN["cache_bytes"])
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="the store's model: also the cross-entropy it keeps")
    ] = None,
    revision: Annotated[str, typer.Option(help="revision of a Hugging Face model")] = "main",
    device: Annotated[str, typer.Option(help="torch device of coder and model")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """FVU, L0 and dead latents of a coder on the store's held-out rows, also at other K and codes.

    With --model, the coder is spliced into the language model: cross-entropy and KL of the next
    token, or for a bidirectional model of tokens that are masked as in BERT's training (masked_*).
    """
    from mptrain.evals.evaluate import evaluate_coder
    from mptrain.runs.results import l0_warnings

    other_codes = choices(codes or (), Codes)
    evaluations = evaluate_coder(
        coder,
        store,
        counts(k or ()),
        rows,
        device,
        other_codes,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
    )
    for warning in l0_warnings(coder, evaluations):
        typer.echo(f"warning: {warning}", err=True)
    found = [dataclasses.asdict(one) for one in evaluations]
    kept = (
        []
        if model is None
        else [spliced_figures(coder, store, model, revision, device, trust_remote_code)]
    )
    if json:
        return print_json({"rows": found, "model": kept[0] if kept else None})
    print_table(tuple(found[0]), found)
    for one in kept:
        print_table(tuple(one), [one])
    return None


@app.command()
@guarded
def plot(
    *,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    out: Annotated[Path, typer.Option(help="files of the figure, without ending")] = Path("fvu"),
    title: Annotated[str | None, typer.Option(help="title of the figure")] = None,
) -> None:
    """FVU over run time, a panel for each hookpoint, kind and k: mp red, topk blue."""
    from mptrain.experiments.plot_runs import plot_runs, read_curves

    for file in plot_runs(runs, out, title=title):
        typer.echo(file)
    for curve in (curve for run in runs for curve in read_curves(run)):
        if curve.diverged:
            rows = f"{curve.records[-1].rows:,}"
            typer.echo(
                f"warning: {curve.coder.name} in {curve.run} diverged after {rows} rows", err=True
            )


@app.command()
@guarded
@from_config(PursuitBenchConfig)
def bench(config: PursuitBenchConfig, json: Json = False) -> None:
    """Measure time, memory and exactness of the pursuit's back ends on this machine."""
    from mpcache.bench.hardware import hardware
    from mptrain.bench.pursuit import bench_pursuit as run
    from mptrain.kernels.device import resolve_device

    report = dataclasses.asdict(run(config))
    machine = hardware(resolve_device(config.device))
    if json:
        return print_json({"hardware": machine, "bench": dataclasses.asdict(config), **report})
    typer.echo(f"{machine}; ratios and changes: to direct on the same rows")
    print_table(tuple(report["methods"][0]), report["methods"])
    return None


@app.command()
@guarded
@from_config(LoaderBenchConfig, arguments=("store",))
def bench_loader(config: LoaderBenchConfig, json: Json = False) -> None:
    """Measure rows per second from a store, their mixing and, with --steps, waiting in training."""
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
