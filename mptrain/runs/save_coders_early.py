"""Save the coders of a run that has not ended, as they are in its last saved state.

Only RUN/coders is written, so that the run may be under way, or may be continued later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.coders.checkpoint import save_coder
from mptrain.config.coder import all_sides
from mptrain.config.run import RunConfig
from mptrain.data.atomic_files import read_json
from mptrain.data.filters import Filters, make_filters
from mptrain.data.loader import Store
from mptrain.data.preflight import open_trainable_store
from mptrain.evals.evaluate import calibrate_thresholds_
from mptrain.kernels.device import resolve_device
from mptrain.runs.results import CoderProgress, coder_progress
from mptrain.runs.run_dir import (
    check_same_run,
    read_manifest,
    recorded_learning_rates,
    recorded_parts,
    resumed_config,
)
from mptrain.runs.saved_state import load_state
from mptrain.runs.state import restore_state_
from mptrain.training.setup import (
    CoderRun,
    learning_rates,
    make_coder_run,
    make_loader,
    train_steps,
)
from mptrain.training.train_sample import TrainSample


@dataclass(frozen=True, kw_only=True)
class SavedCoder(CoderProgress):
    """A coder of a run that has not ended."""

    folder: str | None
    "where it was saved: RUN/coders/NAME-stepN; None: it has diverged and is not saved"


def save_coders(run: str, changes: Mapping[str, Any]) -> list[SavedCoder]:
    """Save the coders of a run's last saved state as RUN/coders/NAME-stepN.

    `changes` are settings that differ from those of the run: the path of its store, the device.
    Returns an item for each coder; an empty list where all of them are finished.

    Raises:
        UsageError: there is no such run, it has no saved state, or the store is another one.
    """
    config = replace(resumed_config(run, changes), follow=False)
    saved = load_state(Path(run))
    if saved is None:
        raise UsageError(
            f"{run} has no saved state; wait until the run saves a state, or start the run again "
            "with "
            "a smaller --save-every"
        )
    state, tensors = saved
    names = state.progress.names
    if set(names) <= _finished(Path(run)):
        return []
    by_name = {coder.name: coder for coder in config.coders()}
    coders = [by_name[name] for name in names]
    sides = all_sides(coders)
    store = open_trainable_store(config, sides, recorded_parts(config))
    check_same_run(config, store.fingerprint)
    filters, device = make_filters(config, store, sides), resolve_device(config.device)
    rates = recorded_learning_rates(config) or learning_rates(config, store)
    sample = TrainSample(filters, store)
    coder_runs = [
        make_coder_run(coder, config, sample, store, device, rates[coder.name].value)
        for coder in coders
    ]
    restore_state_(state, tensors, coder_runs)
    return _save(config, coder_runs, store, filters)


def _finished(run: Path) -> set[str]:
    """Names of the coders that were evaluated and saved at the end of their training."""
    file = run / "results.json"
    return {result["coder"] for result in read_json(file)} if file.exists() else set()


def _save(
    config: RunConfig, coder_runs: Sequence[CoderRun], store: Store, filters: Filters
) -> list[SavedCoder]:
    run = Path(config.run)
    provenance = read_manifest(run).provenance
    healthy = [coder_run for coder_run in coder_runs if not coder_run.diverged]
    coders = {coder_run.config.name: coder_run.trainer.evaluated() for coder_run in healthy}
    if with_threshold := [
        coder for coder in coders.values() if coder.config.architecture.has_threshold
    ]:
        sides = all_sides(coder.config for coder in with_threshold)
        device = with_threshold[0].b_D.device
        with make_loader(config, store, sides, "train", filters=filters, device=device) as loader:
            calibrate_thresholds_(with_threshold, loader, filters)
    saved = []
    for coder_run in coder_runs:
        progress = coder_progress(coder_run, train_steps(config), config.batch_rows)
        folder = None
        if not coder_run.diverged:
            folder = run / "coders" / f"{progress.coder}-step{progress.step}"
            own_filters = filters.of(coder_run.sides).as_json()
            trained = {**provenance, **own_filters, **asdict(progress)}
            save_coder(folder, coders[progress.coder], trained)
        path = None if folder is None else str(folder)
        saved.append(SavedCoder(**asdict(progress), folder=path))
    return saved
