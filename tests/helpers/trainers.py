"""Coders in training on small planted rows.

B rows in a batch, D input width, E target width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig
from mptrain.training.geometric_median import geometric_median
from mptrain.training.normalization import scale_of
from mptrain.training.optimizers import Optimizers, make_optimizers
from mptrain.training.train_step import CoderTrainer

D, STEPS = 12, 100
BASE = CoderConfig(
    inputs=("h:output",),
    targets=("h:output",),
    kind="sae",
    arch="mp",
    k=3,
    expansion=3,
    lr=5e-2,
    optimizer="muon",
    dead_rows=1_000_000,
    normalise=False,
)
TRANSCODER = replace(BASE, kind="transcoder")


def planted(rows: int, seed: int) -> Tensor:
    """Sums of three of 24 fixed directions, off centre: an input of D and a target of D - 2."""
    directions = torch.randn(24, 2 * D - 2, generator=torch.Generator().manual_seed(7))
    directions /= directions.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, 24, generator=generator).topk(3).indices
    return directions[active].sum(1) * 2 + 3


def rows_of(config: CoderConfig, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Input and target; two columns of the input are in the target where widths must be equal."""
    both = planted(rows, seed)
    if config.kind == "sae":
        return both[:, :D], both[:, :D]
    return both[:, :D], both[:, -D:] if config.subtract == "predicting" else both[:, D:]


def optimizers_of(coder: Coder, config: CoderConfig, steps: int) -> Optimizers:
    """The optimizers of a coder with the rate of its config, or 2e-3."""
    return make_optimizers(coder, config, steps, config.lr or 2e-3)


def make_learner(config: CoderConfig, steps: int = STEPS) -> CoderTrainer:
    x_BD, y_BE = rows_of(config, 2000, 0)
    coder = Coder(config, D, y_BE.shape[1])
    generator = torch.Generator().manual_seed(config.seed)
    scale = scale_of(config, float(x_BD.var(0).mean()), float(y_BE.var(0).mean()))
    start = geometric_median if config.start == "median" else lambda rows: rows.mean(0)
    coder.initialise_(scale.input * start(x_BD), scale.target * start(y_BE), generator)
    variances = float(y_BE.var(0).sum()), float(x_BD.var(0).sum())
    optimizers, dead_rows = (
        optimizers_of(coder, config, steps),
        config.resolved_dead_rows(64 * steps, 64),
    )
    return CoderTrainer(coder, optimizers, *variances, scale, dead_rows=dead_rows)


def train_(trainer: CoderTrainer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x_BD, y_BE = rows_of(trainer.coder.config, 64, step + 1)
        losses.append(float(trainer.step(x_BD, y_BE).loss))
    return losses


def fvus_of(trainer: CoderTrainer, steps: int = STEPS) -> list[float]:
    """The FVU of each train step's batch."""
    fvus = []
    for step in range(steps):
        x_BD, y_BE = rows_of(trainer.coder.config, 64, step + 1)
        fvus.append(float(trainer.step(x_BD, y_BE).fvu))
    return fvus


def batch_loss(trainer: CoderTrainer, x_BD: Tensor, y_BE: Tensor) -> Tensor:
    """The loss of a train step on these rows, without dead latents."""
    coder = trainer.coder
    code = coder.encode(x_BD)
    dead_M = torch.zeros(coder.latents, dtype=torch.bool)
    return trainer.objective.loss(code, x_BD, y_BE, coder.predict(code, x_BD), dead_M)
