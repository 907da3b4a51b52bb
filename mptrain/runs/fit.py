"""Train a grid of coders in one pass over a store, or in several passes where memory is short."""

import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from mptrain.config.coder import all_sides
from mptrain.config.run import RunConfig
from mptrain.data.filters import make_filters
from mptrain.data.loader import Store
from mptrain.data.outliers import outlier_warnings
from mptrain.data.preflight import check_variance, open_trainable_store
from mptrain.kernels.device import resolve_device
from mptrain.runs.loggers import check_installed
from mptrain.runs.pass_context import TrainingPass
from mptrain.runs.plan import RunPlan, make_plan
from mptrain.runs.results import CoderResult
from mptrain.runs.run_dir import check_same_run, open_run, recorded_learning_rates, recorded_parts
from mptrain.runs.saved_state import load_progress
from mptrain.runs.state import RunProgress
from mptrain.runs.train_loop import OnStep, TrainLoop
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup, join_process_group
from mptrain.training.learning_rate import GIVEN, LearningRate
from mptrain.training.setup import learning_rates, make_coder_run, make_loader
from mptrain.training.train_sample import TrainSample


def fit(
    config: RunConfig,
    *,
    quiet: bool = True,
    parts: Collection[int] | None = None,
    on_step: OnStep | None = None,
) -> list[CoderResult]:
    """Train, evaluate and save the coders of a run.

    The same call continues an interrupted run from its last saved state; the coders are then the
    same, bit for bit, as those of a run without interruption.

    Example:
        >>> from mptrain import FitConfig, fit
        >>> config = FitConfig(
        ...     store="store", run="first", hookpoints=("layers.1.mlp",), arch=("mp", "topk"),
        ...     k=(3,), expansion=(2,), rows=640, batch_rows=64,
        ... )
        >>> for result in fit(config):
        ...     print(result.coder, result.step, result.validation.fvu < 2)
        layers.1.mlp-sae-mp-k3-x2-seed0 10 True
        layers.1.mlp-sae-topk-k3-x2-seed0 10 True

    Args:
        config: the store, the coders and the settings of the run.
        quiet: whether to show no progress bar on stderr.
        parts: numbers of the store's parts that a new run reads, all of them by default. A
            continued run reads the parts that it began with.
        on_step: called before each train step with the number of the step in its pass, counted
            from 1, and the coders in training. An exception that it raises ends the run.

    Returns:
        A result for each coder, in the order of the grid; RUN/results.json holds the same. Among
        processes that torchrun started, the first process returns the results of all of them.

    Raises:
        ValueError: a mistake of the user (a `mpcache.errors.UsageError`), such as a store without
            rows to train on, or a run folder that holds another run.
        DamagedStoreError: the store does not hold the bytes that were committed.
        KeyboardInterrupt: on Ctrl-C, or on SIGTERM as `Terminated`; during training, the train
            step is completed and the state is saved first.
    """
    with join_process_group(config) as processes:
        return _fit(config, processes, quiet or not processes.is_first, parts, on_step)


def _fit(
    config: RunConfig,
    processes: ProcessGroup,
    quiet: bool,
    parts: Collection[int] | None,
    on_step: OnStep | None,
) -> list[CoderResult]:
    if not processes.is_first:
        processes.barrier()  # the first process has made the run: all read the parts it records
    device = resolve_device(config.device)
    saved = load_progress(Path(config.run), [coder.name for coder in config.coders()])
    store, plan = _plan(config, device, processes, parts, saved, quiet=quiet)
    if plan.epochs > 1 and not quiet:
        rows = f"{config.rows:,} rows are {plan.epochs:.3g} epochs of the {plan.train_rows:,}"
        tqdm.write(f"{rows} train rows in {store.storage}", file=sys.stderr)
    sides = all_sides(config.coders())
    check_variance(store, sides)
    if processes.is_first:
        for warning in outlier_warnings(store, make_filters(config, store, sides), sides):
            warnings.warn(warning, RuntimeWarning, stacklevel=2)
    rates = recorded_learning_rates(config) or learning_rates(config, store)
    if not quiet:
        _print_rates(rates)
    progress = saved or RunProgress(passes=plan.passes)
    first_pass = progress.pass_index
    while progress.pass_index < len(progress.passes):
        with ExitStack() as stack:
            training_pass = _open_pass(
                config, processes, store, rates, progress, device, quiet, stack
            )
            if processes.is_first and progress.pass_index == first_pass:
                processes.barrier()
            results = TrainLoop(training_pass, on_step).run()
        progress = progress.next_pass(results)
    return list(progress.finished)


def _open_pass(
    config: RunConfig,
    processes: ProcessGroup,
    store: Store,
    rates: Mapping[str, LearningRate],
    progress: RunProgress,
    device: torch.device,
    quiet: bool,
    stack: ExitStack,
) -> TrainingPass:
    """Make the coders of a pass and open its loaders; `stack` closes the loaders."""
    by_name = {coder.name: coder for coder in config.coders()}
    coders = [by_name[name] for name in progress.names]
    own_coders = processes.own_coders(coders)
    sides = all_sides(own_coders or coders)
    filters = make_filters(config, store, sides)
    sample = TrainSample(filters, store)
    coder_runs = [
        make_coder_run(coder, config, sample, store, device, rates[coder.name].value, processes)
        for coder in own_coders
    ]
    open_loader = partial(make_loader, config, store, filters=filters, device=device)
    train = stack.enter_context(open_loader(sides, "train", share=processes.share))
    validation = stack.enter_context(open_loader(sides, "validation"))
    calibration = None
    if with_threshold := [coder for coder in own_coders if coder.architecture.has_threshold]:
        calibration = stack.enter_context(open_loader(all_sides(with_threshold), "train"))
    parts = {part.number for loader in (train, validation) for part in loader.parts}
    return TrainingPass(
        config=config,
        processes=processes,
        run=open_run(config, store.source, store.fingerprint, train.order_digest, parts, rates),
        progress=progress,
        coder_runs=coder_runs,
        filters=filters,
        train=train,
        validation=validation,
        calibration=calibration,
        quiet=quiet,
    )


def _print_rates(rates: Mapping[str, LearningRate]) -> None:
    """Print each rate of the rule once, with its reason."""
    for rate in dict.fromkeys(rates.values()):
        if rate.reason != GIVEN:
            tqdm.write(f"lr {rate.value:.2g}: {rate.reason}", file=sys.stderr)


def plan_fit(config: RunConfig) -> RunPlan:
    """Return what `fit` would do. Writes nothing, and raises the errors that `fit` would raise."""
    saved = load_progress(Path(config.run), [coder.name for coder in config.coders()])
    device = resolve_device(config.device)
    return _plan(config, device, SINGLE_PROCESS, None, saved, quiet=True)[1]


def _plan(
    config: RunConfig,
    device: torch.device,
    processes: ProcessGroup,
    parts: Collection[int] | None,
    saved: RunProgress | None,
    *,
    quiet: bool,
) -> tuple[Store, RunPlan]:
    check_installed(config.log)
    recorded = recorded_parts(config)
    store = open_trainable_store(
        config, all_sides(config.coders()), parts if recorded is None else recorded, quiet=quiet
    )
    check_same_run(config, store.fingerprint)
    return store, make_plan(config, store, device, processes, saved.passes if saved else None)
