"""What a sweep has left to do, and what it will take: read, not tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mptrain.config.coder import CoderConfig
from mptrain.config.sides import Side
from mptrain.experiments.runs import Trained, find_runs, plan_runs, read_trained
from mptrain.experiments.spec import Experiment
from mptrain.kernels.device import resolve_device
from mptrain.runs.memory import CoderMemory, coder_memory, group_into_passes, pass_bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of the coders that are not trained to their end yet."""

    coders: int
    "of the part asked for"
    coders_left: int
    "those and others that are trained with them"
    rows_trained: int
    "rows of each coder"
    passes: int
    "over the store, as many as max_memory asks for"
    memory_bytes: int
    "most that the coders of a pass take together, train steps included"
    coders_bytes: int
    "weights of all coders that are left, on disk; a run's state takes two to three times its own"
    train_seconds: float | None
    "by rows/s of these coders, else of others of their architecture and K in this folder; None: "
    "not measured yet"


def forecast(experiment: Experiment, only: Sequence[str], widths: Mapping[Side, int]) -> Estimate:
    """Widths are those of the experiment's sides.

    Raises:
        ValueError: an other_k is not for one of the coders.
    """
    folder = Path(experiment.head.run)
    part = experiment.only(only)
    part.refuse_other_k(lambda coder: coder.latents_of(widths[coder.sides[0]]))
    found = find_runs(folder)
    left = plan_runs(folder, part.coders, found)
    coders = [coder for run in left for coder in run.coders]
    needs = {coder.name: _needs(experiment, coder, widths) for coder in coders}
    passes = [
        [needs[name] for name in names]
        for run in left
        for names in group_into_passes(
            [needs[c.name] for c in run.coders], experiment.fit["max_memory"]
        )
    ]
    return Estimate(
        coders=len(part.coders),
        coders_left=len(coders),
        rows_trained=experiment.fit["rows"],
        passes=len(passes),
        memory_bytes=max((pass_bytes(together) for together in passes), default=0),
        coders_bytes=sum(one.weights_bytes for one in needs.values()),
        train_seconds=_seconds(coders, read_trained(found), experiment.fit["rows"]),
    )


def _needs(experiment: Experiment, coder: CoderConfig, widths: Mapping[Side, int]) -> CoderMemory:
    source, target = (widths[side] for side in coder.sides)
    device = resolve_device(experiment.fit["device"])
    return coder_memory(coder, source, target, experiment.fit["batch_rows"], device)


def _seconds(
    left: Sequence[CoderConfig], trained: Mapping[str, Trained], rows: int
) -> float | None:
    """Train time of what is left; None where nothing tells the speed of one of the coders."""
    total = 0.0
    for coder in left:
        own = trained.get(coder.name)
        if own is not None and own.records and own.records[-1].is_diverged:
            continue  # no train step is left for it
        done = own.records[-1].rows if own is not None and own.records else 0
        like = [t for t in trained.values() if (t.config.arch, t.config.k) == (coder.arch, coder.k)]
        rates = _rates([own] if own is not None else []) or _rates(like)
        if not rates:
            return None
        total += (rows - done) / (sum(rates) / len(rates))
    return total


def _rates(trained: Sequence[Trained]) -> list[float]:
    lasts = [one.records[-1] for one in trained if one.records]
    # rows read, not rows trained on: what is left is counted in rows to read
    return [last.rows / last.train_seconds for last in lasts if last.rows and last.train_seconds]
