"""Gradients of micro-batches add up to the batch's; choices over a batch become per micro-batch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mptrain.config.coder import CoderConfig
from mptrain.training.train_step import CoderTrainer
from tests.helpers.trainers import BASE, TRANSCODER, make_learner, rows_of, train_

DEAD = replace(BASE, dead_rows=1)
OVER_BATCH = [replace(BASE, arch=arch) for arch in ("batch-mp", "batch-topk")]
OTHERS = [
    BASE,
    DEAD,
    replace(DEAD, arch="topk"),
    replace(BASE, arch="groupmax", nested=True),
    replace(BASE, multi_topk=True),
    replace(TRANSCODER, input_loss=0.5, per_step_loss=True),
    replace(BASE, kind="skip-transcoder", codes="omp"),
]


def prepared(config: CoderConfig) -> CoderTrainer:
    """A coder after a few train steps without micro-batches, so that some latents are dead."""
    trainer, plain = make_learner(config), make_learner(replace(config, micro_batch_rows=None))
    train_(plain, 0, 4)
    trainer.load_state_tensors_({n: t.clone() for n, t in plain.state_tensors().items()})
    return trainer


def gradients(trainer: CoderTrainer, x_BD: Tensor, y_BE: Tensor) -> dict[str, Tensor]:
    """Gradients of one train step that updates counters only."""
    trainer.optimizers.step_ = lambda: None  # type: ignore[method-assign]
    trainer.step(x_BD, y_BE)
    named = trainer.coder.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = float(tensor.abs().max())
        assert largest > 0
        torch.testing.assert_close(actual[name], tensor, atol=2e-5 * largest, rtol=2e-5, msg=name)


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.name)
@pytest.mark.parametrize("size", [32, 7, 64, 100])
def test_micro_batches_add_up_to_their_batch(config: CoderConfig, size: int):
    undivided, parts = prepared(config), prepared(replace(config, micro_batch_rows=size))
    x_BD, y_BE = rows_of(config, 64, 9)
    assert_alike(gradients(parts, x_BD, y_BE), gradients(undivided, x_BD, y_BE))
    assert torch.equal(parts.usage.rows_since_fired_M, undivided.usage.rows_since_fired_M)


@settings(max_examples=10)
@given(rows=st.integers(2, 40), size=st.integers(1, 40))
def test_losses_and_fvu_are_those_of_the_batch(rows: int, size: int):
    undivided, parts = prepared(BASE), prepared(replace(BASE, micro_batch_rows=size))
    x_BD, y_BE = rows_of(BASE, rows, 9)
    actual, expected = parts.step(x_BD, y_BE), undivided.step(x_BD, y_BE)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.fvu, expected.fvu)
    assert actual.l0 == expected.l0


@pytest.mark.parametrize("config", OVER_BATCH, ids=lambda config: config.name)
def test_batch_coders_select_in_each_micro_batch(config: CoderConfig):
    """A step is the mean of the steps on its micro-batches."""
    x_BD, _ = rows_of(config, 64, 9)
    x_BD = x_BD * torch.linspace(0.5, 2, 64)[:, None]
    parts = prepared(replace(config, micro_batch_rows=32))
    actual = gradients(parts, x_BD, x_BD)
    halves = [prepared(config), prepared(config)]
    separate = [gradients(h, x, x) for h, x in zip(halves, x_BD.split(32), strict=True)]
    assert_alike(actual, {n: (separate[0][n] + separate[1][n]) / 2 for n in actual})
    undivided = gradients(prepared(config), x_BD, x_BD)
    assert any(not torch.allclose(actual[n], undivided[n], rtol=1e-3, atol=1e-6) for n in actual)


@pytest.mark.parametrize("config", [*OVER_BATCH, *OTHERS], ids=lambda config: config.name)
def test_a_rehearsal_changes_nothing(config: CoderConfig) -> None:
    rehearsed, plain = prepared(config), prepared(config)
    before = {name: tensor.clone() for name, tensor in rehearsed.state_tensors().items()}
    rehearsed.compile_kernels(*rows_of(config, 64, 8))
    for name, tensor in rehearsed.state_tensors().items():
        assert torch.equal(tensor, before[name]), name
    rows = rows_of(config, 64, 9)
    actual, expected = gradients(rehearsed, *rows), gradients(plain, *rows)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name
