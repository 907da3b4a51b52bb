"""Rows are scaled for training, and the saved coder takes unscaled rows."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mptrain.coders.checkpoint import load_coder, save_coder
from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig
from mptrain.training.normalization import TARGET_DEVIATION, scale_of
from mptrain.training.train_step import CoderTrainer
from tests.helpers.trainers import BASE, D, optimizers_of, planted, rows_of

NORMAL = replace(BASE, normalise=True)
CONFIGS = [
    replace(NORMAL, kind=kind, arch=arch, optimizer=optimizer)
    for (kind, arch), optimizer in zip(
        itertools.product(
            ("sae", "transcoder", "skip-transcoder"), ("mp", "batch-mp", "topk", "batch-topk")
        ),
        itertools.cycle(("muon", "adam", "signsgd")),
        strict=False,
    )
]
CONFIGS += [
    replace(NORMAL, kind="transcoder", subtract="predicting"),
    replace(NORMAL, kind="transcoder", subtract="separate", tolerance=0.1),
    replace(NORMAL, free_norm=True),
]


def scaled_learner(config: CoderConfig) -> CoderTrainer:
    """A coder in training whose inputs are a thousand times as large as its targets."""
    variance = planted(2000, 0).var(0).mean()
    scale = scale_of(config, 1e6 * float(variance), float(variance))
    assert scale.input < scale.target / 8 or config.kind == "sae" or scale.input == scale.target
    x_BD, y_BE = rows_of(config, 2000, 0)
    x_BD = 1000 * x_BD
    if config.kind == "sae":
        y_BE, scale = x_BD, scale._replace(target=scale.input)
    coder = Coder(config, D, y_BE.shape[1])
    means = scale.input * x_BD.mean(0), scale.target * y_BE.mean(0)
    coder.initialise_(*means, torch.Generator().manual_seed(0))
    variances = float(y_BE.var(0).sum()), float(x_BD.var(0).sum())
    optimizers = optimizers_of(coder, config, 30)
    trainer = CoderTrainer(coder, optimizers, *variances, scale, dead_rows=10**6)
    for step in range(10):
        x_BD, y_BE = batch_of(config, step)
        trainer.step(x_BD, y_BE)
    return trainer


def batch_of(config: CoderConfig, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x_BD, y_BE = rows_of(config, 64, seed)
    return 1000 * x_BD, 1000 * x_BD if config.kind == "sae" else y_BE


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_saved_coder_gives_the_same_for_rows_as_they_are(config: CoderConfig, tmp_path: Path):
    """Except for rounding; a coder that is loaded or built again is not scaled twice."""
    trainer = scaled_learner(config)
    x_BD, _ = batch_of(config, 99)
    inside = replace_weights(trainer)
    with torch.no_grad():
        expected = inside.encode(trainer.scale.input * x_BD)
        predicted_BE = inside.predict(expected, trainer.scale.input * x_BD)
    trainer.evaluated()
    save_coder(tmp_path / "coder", trainer.evaluated(), {})
    for coder in (trainer.evaluated(), load_coder(tmp_path / "coder")[0]):
        with torch.no_grad():
            code = coder.encode(x_BD)
            assert torch.equal(code.idx_BK, expected.idx_BK)
            values_BK = code.val_BK * trainer.scale.input
            assert_close(values_BK, expected.val_BK, rtol=1e-4, atol=1e-5)
            scaled_BE = coder.predict(code, x_BD) * trainer.scale.target
            assert_close(scaled_BE, predicted_BE, rtol=1e-4, atol=1e-5)
        for name in coder.unit_norm:
            assert torch.equal(coder.get_parameter(name), inside.get_parameter(name))


def replace_weights(trainer: CoderTrainer) -> Coder:
    """Change the weights that `evaluated` must restore."""
    coder = Coder(trainer.coder.config, D, len(trainer.coder.output_bias_E))
    coder.load_state_dict({**trainer.coder.state_dict(), **trainer.optimizers.averages()})
    return coder


def test_losses_are_shares_of_the_variance_at_any_scale():
    x_BD, _ = batch_of(BASE, 50)
    losses = []
    for config in (BASE, NORMAL):
        coder = Coder(config, D, D)
        scale = scale_of(config, 1e6, 1e6)
        coder.initialise_(
            scale.input * x_BD.mean(0), x_BD.mean(0), torch.Generator().manual_seed(0)
        )
        variance = float(x_BD.var(0).sum())
        trainer = CoderTrainer(
            coder, optimizers_of(coder, config, 30), variance, scale=scale, dead_rows=10**6
        )
        result = trainer.step(x_BD, x_BD)
        losses.append((float(result.loss), float(result.fvu)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))
def test_scaled_rows_have_one_variance(input_variance: float, target_variance: float):
    scale = scale_of(replace(NORMAL, kind="transcoder"), input_variance, target_variance)
    assert input_variance * scale.input**2 == pytest.approx(1)
    assert target_variance * scale.target**2 == pytest.approx(TARGET_DEVIATION**2)
    own = scale_of(NORMAL, input_variance, input_variance)
    assert own.input == own.target == scale.input
    assert scale_of(BASE, input_variance, target_variance) == (1, 1)
    assert scale_of(NORMAL, 0.0, 0.0) == (1, 1)
