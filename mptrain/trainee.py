"""One coder of a run, from its start on.

D input width, E target width.
"""

from dataclasses import dataclass

import torch

from mptrain.coder import Coder
from mptrain.config import RunConfig
from mptrain.evaluate import sides_of
from mptrain.loader import Side, Store
from mptrain.optimize import make_optimizers
from mptrain.recipe import CoderConfig
from mptrain.train_step import Learner


@dataclass(kw_only=True)
class Trainee:
    """One coder of the grid with what its training has cost so far."""

    config: CoderConfig
    learner: Learner
    train_seconds: float = 0.0
    lr: float = 0.0
    "learning rate of the last train step"
    diverged: bool = False

    @property
    def sides(self) -> tuple[Side, Side]:
        return sides_of(self.config)

    def rows_per_second(self, rows: int) -> float:
        """Of this many rows read; 0 where no batch had a row to train on."""
        return rows / self.train_seconds if self.train_seconds else 0.0


def train_steps(config: RunConfig) -> int:
    """Whole batches in the rows to train on."""
    return config.rows // config.batch_rows


def make_trainee(
    config: CoderConfig, run: RunConfig, store: Store, device: torch.device
) -> Trainee:
    """A coder at its start: biases at the means of the train split, atoms drawn by its seed."""
    (input_side, target_side) = sides_of(config)
    input_mean_D, input_variance_D = store.moments(*input_side, "train")
    target_mean_E, target_variance_E = store.moments(*target_side, "train")
    coder = Coder(config, len(input_mean_D), len(target_mean_E))
    coder.initialise_(
        input_mean_D.float(), target_mean_E.float(), torch.Generator().manual_seed(config.seed)
    )
    coder.to(device)
    optimizers = make_optimizers(coder, config, train_steps(run))
    variances = float(target_variance_E.sum()), float(input_variance_D.sum())
    return Trainee(config=config, learner=Learner(coder, optimizers, *variances))
