"""Coders of an experiment with invented training curves."""

from collections.abc import Sequence
from pathlib import Path

from mptrain.config.coder import CoderConfig
from mptrain.experiments.runs import TrainedCoder
from mptrain.experiments.spec import Experiment
from mptrain.runs.metrics_file import Record


def record(coder: str, step: int, fvu: float, seconds: float) -> Record:
    return Record(
        coder=coder,
        step=step,
        rows=64 * step,
        train_seconds=seconds,
        wait_seconds=3.0,
        validation_seconds=8.0,
        fvu=fvu,
        validation_fvu=fvu,
        l0=3.0,
        dead_share=0.0,
        lr=1e-3,
        rows_per_second=64.0,
        peak_memory_bytes=1,
    )


def trained(
    config: CoderConfig,
    fvus: Sequence[float],
    *,
    seconds: float = 1.0,
    diverged: bool = False,
    folder: Path = Path("run"),
) -> TrainedCoder:
    """A coder with a validation after each train step; a step took `seconds`."""
    records = [record(config.name, n, fvu, n * seconds) for n, fvu in enumerate(fvus, 1)]
    validation = {"fvu": fvus[-1], "l0": 3.0, "dead_share": 0.0, "rows": 256} if fvus else None
    result = {"validation": None if diverged else validation, "diverged": diverged}
    return TrainedCoder(config, folder, tuple(records), result)


def all_trained(experiment: Experiment) -> dict[str, TrainedCoder]:
    """Every coder of an experiment, each with a curve of its own."""
    coders = {}
    for number, config in enumerate(experiment.coders):
        level = 0.3 + 0.2 * ((number * 7) % 11) / 11
        fvus = [level + 0.4 / step for step in range(1, 21)]
        coders[config.name] = trained(config, fvus, seconds=10.0 + number % 5)
    return coders
