"""What a sweep has left to do, and what it will take: computed from files, without training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mptrain.config.coder import CoderConfig
from mptrain.config.sides import Side
from mptrain.experiments.runs import TrainedCoder, find_runs, plan_runs, read_trained
from mptrain.experiments.spec import Experiment
from mptrain.kernels.device import resolve_device
from mptrain.runs.memory import CoderMemory, coder_memory, group_into_passes, pass_bytes


@dataclass(frozen=True, kw_only=True)
class SweepEstimate:
    """Cost of the coders that are not fully trained yet."""

    coders: int
    "coders of the chosen part"
    coders_left: int
    "coders to train, with those that share a run with them"
    rows_trained: int
    "rows that each coder is trained on"
    passes: int
    "passes over the store; max_memory decides how many"
    memory_bytes: int
    "memory of the coders of the largest pass, train steps included"
    coders_bytes: int
    "disk space of the weights of all coders left; the state of a run takes two to three times more"
    train_seconds: float | None
    "by the speed of these coders so far, or of others in this folder with the same architecture "
    "and K; None: no speed is known"


def estimate_sweep(
    experiment: Experiment, only: Sequence[str], widths: Mapping[Side, int]
) -> SweepEstimate:
    """Estimate a sweep, or the part that `only` names; `widths` has all sides of the experiment.

    Raises:
        UsageError: a coder cannot be evaluated at one of its other_k.
    """
    part, run_settings = experiment.only(only), experiment.run_settings
    part.check_other_k(lambda coder: coder.latents_of(widths[coder.sides[0]]))
    runs = find_runs(Path(experiment.header.folder))
    runs_left = plan_runs(Path(experiment.header.folder), part.coders, runs)
    coders_left = [coder for run in runs_left for coder in run.coders]
    memory = {coder.name: _memory_of(experiment, coder, widths) for coder in coders_left}
    passes = [
        [memory[name] for name in names]
        for run in runs_left
        for names in group_into_passes(
            [memory[c.name] for c in run.coders], run_settings["max_memory"]
        )
    ]
    return SweepEstimate(
        coders=len(part.coders),
        coders_left=len(coders_left),
        rows_trained=run_settings["rows"],
        passes=len(passes),
        memory_bytes=max((pass_bytes(coders) for coders in passes), default=0),
        coders_bytes=sum(coder.weights_bytes for coder in memory.values()),
        train_seconds=_train_seconds(coders_left, read_trained(runs), run_settings["rows"]),
    )


def _memory_of(
    experiment: Experiment, coder: CoderConfig, widths: Mapping[Side, int]
) -> CoderMemory:
    source, target = (widths[side] for side in coder.sides)
    device = resolve_device(experiment.run_settings["device"])
    return coder_memory(coder, source, target, experiment.run_settings["batch_rows"], device)


def _train_seconds(
    coders_left: Sequence[CoderConfig], trained: Mapping[str, TrainedCoder], rows: int
) -> float | None:
    """Train time of the coders left; None if the speed of a coder is unknown."""
    total = 0.0
    for coder in coders_left:
        own = trained.get(coder.name)
        if own is not None and own.records and own.records[-1].is_diverged:
            continue  # a diverged coder is not trained further
        done = own.records[-1].rows if own is not None and own.records else 0
        like = [t for t in trained.values() if (t.config.arch, t.config.k) == (coder.arch, coder.k)]
        rates = _rates([own] if own is not None else []) or _rates(like)
        if not rates:
            return None
        total += (rows - done) / (sum(rates) / len(rates))
    return total


def _rates(trained: Sequence[TrainedCoder]) -> list[float]:
    last_records = [coder.records[-1] for coder in trained if coder.records]
    # rows read, not rows trained on, because the rows left are counted as rows to read
    return [r.rows / r.train_seconds for r in last_records if r.rows and r.train_seconds]
