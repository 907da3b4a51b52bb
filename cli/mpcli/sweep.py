"""What `mptrain sweep` needs of both packages: an experiment's collection, and its forecast."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpcache.config import CollectConfig, split_of
from mpcli.store_location import locate_store
from mptrain.experiments.spec import Experiment, experiment_of
from mptrain.experiments.toml_config import read_settings

_BYTES = {"float32": 4}  # of a value; the other dtypes have 2


def read(file: Path, changes: Sequence[str]) -> tuple[Experiment, CollectConfig]:
    """The experiment of a file, and the collection of all that its figures need."""
    settings = read_settings(file, changes)
    experiment = experiment_of(settings)
    return experiment, settings.build(("collect",), CollectConfig, hookpoints=experiment.sides)


def settings_of(config: CollectConfig) -> dict[str, Any]:
    """What an experiment file says of a collection: hookpoints are those of its figures."""
    return {n: v for n, v in dataclasses.asdict(config).items() if n != "hookpoints"}


def collect(experiment: Experiment, config: CollectConfig, sides: Sequence[str]) -> str:
    """Collect what is missing of these sides; gives the store.

    Raises:
        OSError: parts could not be collected.
    """
    from mpcache.collection.collect import collect as run

    asked = dataclasses.replace(config, hookpoints=tuple(sides))
    location = locate_store(experiment.head.store, experiment.head.root, asked)
    done = location.summary or run(location.config, location.storage, quiet=False)
    if done.missing:
        told = "; ".join(f"part {part.part}: {part.cause}" for part in done.missing)
        raise OSError(f"parts are missing in {done.store} ({told}); the same command goes on")
    if done.shortfall:
        warnings.warn(f"{done.store} has {done.shortfall}", RuntimeWarning, stacklevel=2)
    return str(location.storage)


def widths_of(config: CollectConfig) -> dict[tuple[str, str], int]:
    """The width of each side that is read, without the model's weights."""
    import torch

    from mpcache.model.hookpoint_patterns import resolve_sides
    from mpcache.model.hooks import widths
    from mpcache.model.skeleton import skeleton

    # memory that is only read is never really taken, and models branch on values: meta has none
    model = skeleton(config).to(getattr(torch, config.model_dtype)).to_empty(device="cpu")
    found = widths(model, resolve_sides(config.hookpoints, model))
    return {(side.hookpoint, side.side): width for side, width in found.items()}


def forecast(experiment: Experiment, config: CollectConfig, only: Sequence[str]) -> dict[str, Any]:
    """What a sweep would do and need, before it does anything."""
    from mptrain.experiments.estimate import forecast as of_training
    from mptrain.experiments.runs import refuse_other_settings

    refuse_other_settings(Path(experiment.head.run), experiment.resolved(settings_of(config)))
    part = experiment.only(only)
    config = dataclasses.replace(config, hookpoints=part.sides)
    widths = widths_of(config)
    parts = max(2, -(-config.rows // config.part_rows))  # both splits have a part
    rows = parts * config.part_rows
    splits = [split_of(number, config.validation_every) for number in range(parts)]
    train_rows = splits.count("train") * config.part_rows
    return {
        "rows_collected": rows,
        "train_rows": train_rows,
        "epochs": experiment.fit["rows"] / train_rows,
        "panels": [panel.name for panel in part.panels],
        "sides": len(widths),
        "store_bytes": rows * sum(widths.values()) * _BYTES.get(config.dtype, 2),
        **dataclasses.asdict(of_training(experiment, only, widths)),
    }
