"""What `mptrain sweep` needs of both packages: the collection of an experiment, and its cost."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpcache.config import CollectConfig, parts_for, split_of
from mpcli.store_to_fill import locate_store
from mptrain.experiments.experiment_file import parse_experiment
from mptrain.experiments.spec import Experiment
from mptrain.experiments.toml_config import read_settings

_BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}


def read_experiment(file: Path, changes: Sequence[str]) -> tuple[Experiment, CollectConfig]:
    """The experiment in a file, and the collection of all sides that its figures need."""
    settings = read_settings(file, changes)
    experiment = parse_experiment(settings)
    return experiment, settings.build(("collect",), CollectConfig, hookpoints=experiment.sides)


def collect_settings(config: CollectConfig) -> dict[str, Any]:
    """The table [collect] of a collection with all defaults; hookpoints come from the figures."""
    return {n: v for n, v in dataclasses.asdict(config).items() if n != "hookpoints"}


def collect_sides(experiment: Experiment, config: CollectConfig, sides: Sequence[str]) -> str:
    """Collect the sides that are missing; gives the store.

    Raises:
        OSError: parts could not be collected.
    """
    from mpcache.collection.collect import collect

    wanted = dataclasses.replace(config, hookpoints=tuple(sides))
    location = locate_store(experiment.header.store, experiment.header.root, wanted)
    summary = location.summary or collect(location.config, location.storage, quiet=False)
    if summary.missing:
        causes = "; ".join(f"part {part.part}: {part.cause}" for part in summary.missing)
        raise OSError(
            f"{len(summary.missing)} parts of {summary.store} could not be collected ({causes}); "
            "run the same command again to retry them"
        )
    if summary.shortfall:
        message = f"{summary.store} has {summary.shortfall}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return str(location.storage)


def side_widths(config: CollectConfig) -> dict[tuple[str, str], int]:
    """The width of each side that is read, without loading the model's weights."""
    import torch

    from mpcache.model.hookpoint_patterns import resolve_sides
    from mpcache.model.hooks import widths
    from mpcache.model.skeleton import skeleton

    # not on meta, where models that branch on values fail; memory that is only read is never
    # allocated
    model = skeleton(config).to(getattr(torch, config.model_dtype)).to_empty(device="cpu")
    by_side = widths(model, resolve_sides(config.hookpoints, model))
    return {(side.hookpoint, side.side): width for side, width in by_side.items()}


def estimate(experiment: Experiment, config: CollectConfig, only: Sequence[str]) -> dict[str, Any]:
    """What a sweep would do and cost; nothing is written."""
    from mptrain.experiments.estimate import estimate_sweep
    from mptrain.experiments.runs import check_same_settings

    folder = Path(experiment.header.folder)
    check_same_settings(folder, experiment.resolved(collect_settings(config)))
    part = experiment.only(only)
    config = dataclasses.replace(config, hookpoints=part.sides)
    widths = side_widths(config)
    parts = parts_for(config.rows, config.part_rows)
    rows = parts * config.part_rows
    splits = [split_of(number, config.validation_every) for number in range(parts)]
    train_rows = splits.count("train") * config.part_rows
    return {
        "rows_collected": rows,
        "train_rows": train_rows,
        "epochs": experiment.run_settings["rows"] / train_rows,
        "panels": [panel.name for panel in part.panels],
        "sides": len(widths),
        "store_bytes": rows * sum(widths.values()) * _BYTES_PER_VALUE[config.dtype],
        **dataclasses.asdict(estimate_sweep(experiment, only, widths)),
    }
