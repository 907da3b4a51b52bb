"""Run an experiment: collect and train what is missing, evaluate the coders, draw the figures."""

import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.coder import all_sides
from mptrain.config.run import ListedConfig
from mptrain.data.atomic_files import explain_write_errors, write_json
from mptrain.data.loader import open_store
from mptrain.data.preflight import common_parts
from mptrain.data.ranges_as_text import format_ranges
from mptrain.experiments.experiment_file import read_experiment
from mptrain.experiments.figure_folder import write_figure_folder
from mptrain.experiments.other_k import evaluate_other_k
from mptrain.experiments.run_hardware import log_hardware
from mptrain.experiments.runs import (
    NEW_FOLDER,
    SweepRun,
    check_same_rows,
    check_same_settings,
    find_runs,
    plan_runs,
    read_trained,
    resolved_file,
)
from mptrain.experiments.spec import Experiment
from mptrain.experiments.verdicts import Verdict, find_problems, panel_verdicts
from mptrain.runs.fit import fit
from mptrain.training.distributed import is_distributed

Collect = Callable[[Sequence[str]], str]
"collects the sides that are missing; gives the path or URL of the store"


@dataclass(frozen=True)
class SweepResult:
    """Files and verdicts of a sweep."""

    files: tuple[Path, ...]
    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...]
    "panels without a curve, and variants that change nothing"
    warnings: tuple[str, ...]
    "warnings about the results of coders"


def sweep(
    experiment: Experiment | Path | str,
    *,
    only: Sequence[str] = (),
    collect: Collect | None = None,
    collect_settings: Mapping[str, Any] | None = None,
    hardware: str = "unknown",
    quiet: bool = True,
) -> SweepResult:
    """Train the coders of an experiment that are missing, evaluate them and draw the figures.

    All coders read the same parts of the store, also if the store has grown since the first run.
    After an interruption, the same call goes on.

    Example:
        >>> from pathlib import Path
        >>> from mptrain import sweep
        >>> text = '''
        ... title = "tiny"
        ... folder = "experiment"
        ... store = "store"
        ... data = {rows = 640, batch_rows = 64}
        ... coder = {expansion = 2}
        ... loss = {dead_rows = 200}
        ... evaluation = {eval_every = 5}
        ...
        ... [figures.main]
        ... hookpoints = ["layers.1.mlp"]
        ... k = [3]
        ... variants = ["mp", "topk"]
        ... '''
        >>> file = Path("tiny.toml")
        >>> size = file.write_text(text)
        >>> for verdict in sweep(file).verdicts:
        ...     print(verdict.panel, verdict.variant, verdict.fvu < 2)
        main/layers.1.mlp-sae-k3 mp True
        main/layers.1.mlp-sae-k3 topk True

    Args:
        experiment: an experiment, or the path of an experiment file.
        only: figures, or panels as `figure/hookpoint-kind-kK`; `*` is a wildcard. Default: all.
        collect: collects the sides that it is given, and returns the store. It is called only if
            something is left to do. Default: the `store` of the experiment, as it is.
        collect_settings: the settings of `collect`, for captions and for the comparison with an
            earlier sweep in the same folder. Default: the table `[collect]` as it is written.
        hardware: description of this machine, for captions.
        quiet: whether to show no progress.

    Returns:
        Paths of all figures and tables, and a verdict for each line of each panel.

    Raises:
        UsageError: the experiment is invalid, or its folder has coders with other settings.
        KeyboardInterrupt: after an interrupted run has saved its state.
    """
    if is_distributed():
        raise UsageError(
            "mptrain sweep runs in one process, got several by torchrun; start it without torchrun"
        )
    if not isinstance(experiment, Experiment):
        experiment = read_experiment(experiment)
    if collect_settings is not None:
        experiment = replace(experiment, collect=collect_settings)
    folder, part = Path(experiment.header.folder), experiment.only(only)
    save_experiment(folder, experiment)
    get_store = functools.cache(lambda: (collect or _existing_store(experiment))(part.sides))
    _train_missing(part, folder, get_store, hardware, quiet=quiet)
    runs = find_runs(folder)
    check_same_rows(runs)
    trained = read_trained(runs)
    coders = {c.name: trained[c.name] for c in part.coders if c.name in trained}
    fvu_by_k = evaluate_other_k(part, folder, coders, get_store, quiet=quiet)
    files = [
        file for plan in part.figures for file in write_figure_folder(part, plan, coders, fvu_by_k)
    ]
    return SweepResult(
        tuple(files),
        tuple(verdict for panel in part.panels for verdict in panel_verdicts(panel, coders)),
        tuple(find_problems(part.panels, coders)),
        tuple(warning for coder in coders.values() for warning in coder.warnings),
    )


def save_experiment(folder: Path, experiment: Experiment) -> None:
    """Save the resolved experiment beside the results.

    Raises:
        UsageError: the folder has coders with other settings.
    """
    resolved = experiment.resolved(experiment.collect)
    check_same_settings(folder, resolved)
    with explain_write_errors(folder):
        write_json(resolved_file(folder), resolved)


def run_config(experiment: Experiment, run: SweepRun, store: str) -> ListedConfig:
    """The config of a run of the experiment."""
    return ListedConfig(
        **experiment.run_settings, store=store, run=str(run.folder), listed=run.coders
    )


def _existing_store(experiment: Experiment) -> Collect:
    store = experiment.header.store
    if store is None:
        raise UsageError(
            "an experiment file with the key root needs the argument collect of sweep(), got none; "
            "give collect, or write the key store instead of root"
        )
    return lambda sides: store


def _train_missing(
    part: Experiment, folder: Path, get_store: Callable[[], str], hardware: str, *, quiet: bool
) -> None:
    """Continue the unfinished runs, then train all coders that are in no run."""
    started = find_runs(folder)
    check_same_rows(started)
    parts = started[0].parts if started else None
    runs_left = plan_runs(folder, part.coders, started)
    if not runs_left:
        return
    for run in runs_left:
        for warning in run_config(part, run, "").warnings():
            warnings.warn(warning, RuntimeWarning, stacklevel=3)
    store = get_store()
    _check_store(part, runs_left, parts, store)
    for run in runs_left:
        log_hardware(folder, run.folder.name, hardware)
        fit(run_config(part, run, store), quiet=quiet, parts=parts)


def _check_store(
    part: Experiment, runs: Sequence[SweepRun], parts: Collection[int] | None, location: str
) -> None:
    """Refuse, before any training, a store that the coders or their evaluation cannot use."""
    store = open_store(location)
    part.check_other_k(lambda coder: coder.latents_of(store.width(*coder.sides[0])))
    for run in runs:
        available = common_parts(store, all_sides(run.coders))
        if lost := set(parts or ()) - available:
            raise UsageError(
                f"{store.storage} lacks parts {format_ranges(lost)}, on which the coders in "
                f"{part.header.folder} were trained; collect these parts again, or give "
                f"{NEW_FOLDER}"
            )
