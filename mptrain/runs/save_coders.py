"""Coders of a run that has not ended: those of its last saved state, marked with their step.

Only the run's folder of coders is written, so that the run may be under way, or go on later.
"""

from collections.abc import Mapping
from dataclasses import replace
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
from mptrain.evals.evaluate import calibrate_
from mptrain.kernels.device import resolve_device
from mptrain.runs.results import result_so_far
from mptrain.runs.run_dir import check_same_run, read_run_config, recorded_parts, resumed_config
from mptrain.runs.saved_state import load_state
from mptrain.runs.state import RunProgress, restore_
from mptrain.training.setup import CoderRun, make_coder_run, make_loader, train_steps


def save_coders(run: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Save the coders of a run's last state; gives a row for each, none where all are finished.

    `given` are settings that differ from the run's: where its store is now, the device to use.

    Raises:
        ValueError: there is no such run, it has no state yet, or the store is another one.
    """
    config = replace(resumed_config(run, given), follow=False)
    state = load_state(Path(run))
    if state is None:
        raise UsageError(
            f"{run} has no saved state; wait until the run has saved one, or start it again with "
            "a smaller --save-every"
        )
    about, tensors = state
    progress = RunProgress(**about["progress"])
    if set(progress.names) <= _finished(Path(run)):
        return []
    coders = {coder.name: coder for coder in config.coders()}
    together = [coders[name] for name in progress.names]
    sides = all_sides(together)
    store = open_trainable_store(config, sides, recorded_parts(config))
    check_same_run(config, store.fingerprint)
    filters, device = make_filters(config, store, sides), resolve_device(config.device)
    coder_runs = [make_coder_run(coder, config, filters, store, device) for coder in together]
    restore_(about, tensors, coder_runs, config.batch_rows)
    return _save(config, coder_runs, store, filters)


def _finished(run: Path) -> set[str]:
    """Names of the coders that were evaluated and saved at the end of their training."""
    file = run / "results.json"
    return {result["coder"] for result in read_json(file)} if file.exists() else set()


def _save(
    config: RunConfig, coder_runs: list[CoderRun], store: Store, filters: Filters
) -> list[dict[str, Any]]:
    run = Path(config.run)
    started = read_run_config(run)
    provenance = {name: started[name] for name in ("store_fingerprint", "order_digest")}
    healthy = [coder_run for coder_run in coder_runs if not coder_run.diverged]
    coders = {coder_run.config.name: coder_run.trainer.evaluated() for coder_run in healthy}
    if batch := [coder for coder in coders.values() if coder.config.architecture.has_threshold]:
        sides = all_sides(coder.config for coder in batch)
        device = batch[0].b_D.device
        with make_loader(config, store, sides, "train", filters=filters, device=device) as sample:
            calibrate_(batch, sample, filters)
    rows = []
    for coder_run in coder_runs:
        result = result_so_far(coder_run, train_steps(config), config.batch_rows)
        folder = None
        if not coder_run.diverged:
            folder = run / "coders" / f"{coder_run.config.name}-step{result['step']}"
            trained = {**provenance, **filters.of(coder_run.sides).as_json(), **result}
            save_coder(folder, coders[coder_run.config.name], trained)
        rows.append({**result, "folder": None if folder is None else str(folder)})
    return rows
