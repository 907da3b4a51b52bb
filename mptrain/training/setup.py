"""The coders of a run at its start, and the loaders that it reads with.

N rows, D input width, E target width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig
from mptrain.config.run import RunConfig
from mptrain.config.sides import Side, Sides
from mptrain.data.filters import Filters
from mptrain.data.loader import Loader, Split, Store
from mptrain.data.window_plans import WHOLE_STREAM, StreamShare
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup
from mptrain.training.learning_rate import LearningRate, learning_rate
from mptrain.training.normalization import IDENTITY, scale_of
from mptrain.training.optimizers import make_optimizers
from mptrain.training.train_sample import TrainSample
from mptrain.training.train_step import CoderTrainer


@dataclass(kw_only=True)
class CoderRun:
    """A coder of a run in training, with what its training has cost so far."""

    config: CoderConfig
    trainer: CoderTrainer
    train_seconds: float = 0.0
    rows_read: int = 0
    "rows in the batches of its train steps, before its filters"
    rows_trained: int = 0
    "rows that its filters kept"
    lr: float = 0.0
    "learning rate of the last train step"
    diverged: bool = False

    @property
    def sides(self) -> Sides:
        return self.config.sides

    @property
    def rows_per_second(self) -> float:
        """Rows trained per second of its own train time; 0 where its filters kept no row."""
        return self.rows_trained / self.train_seconds if self.train_seconds else 0.0


def train_steps(config: RunConfig) -> int:
    """Return the number of whole batches in the rows to train on."""
    return config.rows // config.batch_rows


def learning_rates(run: RunConfig, store: Store) -> dict[str, LearningRate]:
    """Return the peak learning rate of each coder of a run, by name."""
    return {
        coder.name: learning_rate(
            coder, store.width(*coder.input), run.batch_rows, train_steps(run)
        )
        for coder in run.coders()
    }


def make_coder_run(
    config: CoderConfig,
    run: RunConfig,
    sample: TrainSample,
    store: Store,
    device: torch.device,
    lr: float,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> CoderRun:
    """Return a coder at its start: biases in the middle of the train rows, atoms drawn by its seed.

    `lr` is its peak learning rate.

    Means and variances (losses are divided by variances) are those of the store: of all finite
    train rows, before filters. Medians and scales are of a sample of filtered rows, because a few
    first tokens may be larger than all other rows together.
    """
    sides = config.sides
    (mean_D, variance_D), (mean_E, variance_E) = (
        store.acts.moments(*side, "train") for side in sides
    )
    scale = IDENTITY
    if config.normalise:
        scale = scale_of(config, *sample.variances(sides))
    if config.start == "median":
        mean_D, mean_E = sample.medians(sides)
    coder = Coder(config, len(mean_D), len(mean_E))
    coder.initialise_(
        scale.input * mean_D.float(),
        scale.target * mean_E.float(),
        torch.Generator().manual_seed(config.seed),
    )
    coder.to(device)
    optimizers = make_optimizers(coder, config, train_steps(run), lr)
    variances = float(variance_E.sum()), float(variance_D.sum())
    dead_rows = config.resolved_dead_rows(run.rows, run.batch_rows)
    trainer = CoderTrainer(coder, optimizers, *variances, scale, processes, dead_rows=dead_rows)
    return CoderRun(config=config, trainer=trainer)


def make_loader(
    config: RunConfig,
    store: Store,
    sides: Sequence[Side],
    split: Split,
    *,
    filters: Filters,
    device: torch.device,
    share: StreamShare = WHOLE_STREAM,
) -> Loader:
    """Return a loader of a split, with the order and the row fields of a run."""
    return Loader(
        store,
        sides,
        split,
        batch_rows=config.batch_rows,
        seed=config.order_seed,
        window_rows=config.window_rows,
        threads=config.read_threads,
        row_fields=filters.of(sides).row_fields,
        device=device,
        share=share,
    )
