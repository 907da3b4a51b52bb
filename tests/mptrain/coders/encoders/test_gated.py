"""Gated coders.

B rows in a batch, D input width, E target width, M latents.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mptrain.coders.encoders.gated import GatedEncoder
from mptrain.config.sides import Kind
from mptrain.training.train_step import CoderTrainer
from tests.helpers import reference
from tests.helpers.trainers import BASE, batch_loss, fvus_of, make_learner, rows_of, train_

GATED = replace(BASE, arch="gated", k=None)
KINDS: tuple[Kind, ...] = ("sae", "transcoder", "skip-transcoder")


def encoder_of(trainer: CoderTrainer) -> GatedEncoder:
    assert isinstance(trainer.coder.encoder, GatedEncoder)
    return trainer.coder.encoder


def gates(trainer: CoderTrainer, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and values before their relu, with weights that are not shared."""
    encoder, centred_BD = encoder_of(trainer), x_BD - trainer.coder.b_D
    gate_BM = centred_BD @ encoder.encoder_MD.T + encoder.gate_bias_M
    values_MD = encoder.log_scale_M.exp()[:, None] * encoder.encoder_MD
    return gate_BM, centred_BD @ values_MD.T + encoder.bias_M


def dense_loss(trainer: CoderTrainer, x_BD: Tensor, y_BE: Tensor) -> Tensor:
    """Eq. 8, on dense codes."""
    coder, total = trainer.coder, trainer.objective.total_variance
    gate_BM, value_BM = gates(trainer, x_BD)
    y_hat_BE = (value_BM.relu() * (gate_BM > 0)) @ coder.decoder_ME + coder.decode_offset(x_BD)
    fixed_ME, fixed_offset = coder.decoder_ME.detach(), coder.decode_offset(x_BD).detach()
    by_gate_BE = gate_BM.relu() @ fixed_ME + fixed_offset
    l1_B = (gate_BM.relu() * fixed_ME.norm(dim=1)).sum(1)
    errors_B = ((y_BE - y_hat_BE).square() + (y_BE - by_gate_BE).square()).sum(1) / total
    return (errors_B + coder.config.sparsity_weight * l1_B / total**0.5).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_dense_codes(kind: Kind) -> None:
    trainer = make_learner(replace(GATED, kind=kind, sparsity_weight=0.05))
    train_(trainer, 0, 5)
    coder = trainer.coder.double()
    x_BD, y_BE = (t.double() for t in rows_of(coder.config, 16, 9))
    parameters = list(coder.parameters())
    losses = [loss(trainer, x_BD, y_BE) for loss in (batch_loss, dense_loss)]
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in losses)
    torch.testing.assert_close(*losses)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind: Kind) -> None:
    trainer = make_learner(replace(GATED, kind=kind, lr=2e-2))
    fvus = fvus_of(trainer)
    assert sum(fvus[-5:]) < 0.7 * sum(fvus[:5])
    assert (encoder_of(trainer).log_scale_M != 0).any()


def test_a_larger_weight_gives_sparser_codes_and_the_code_is_the_gated_value() -> None:
    latents = []
    x_BD, _ = rows_of(GATED, 100, 99)
    for weight in (0.0, 0.3):
        trainer = make_learner(replace(GATED, sparsity_weight=weight, lr=2e-2))
        train_(trainer, 0, 60)
        code = trainer.coder.encode(x_BD)
        gate_BM, value_BM = gates(trainer, x_BD)
        expected_BM = value_BM.relu() * (gate_BM > 0)
        code_BM = reference.dense(code.idx_BK, code.val_BK, 36)
        torch.testing.assert_close(code_BM, expected_BM, atol=1e-5, rtol=1e-5)
        latents.append(float((code.idx_BK >= 0).sum()))
    assert latents[1] < 0.7 * latents[0]
