"""JumpReLU coders.

B rows in a batch, D input width, E target width, M latents.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mptrain.coders.encoders.jumprelu import JumpReluEncoder, jump_relu
from mptrain.config.sides import Kind
from mptrain.training.objective import NESTED_SHARES
from tests.helpers import reference
from tests.helpers.trainers import BASE, batch_loss, fvus_of, make_learner, rows_of, train_

JUMP = replace(BASE, arch="jumprelu", k=None, sparsity_weight=0.003, bandwidth=0.2)
KINDS: tuple[Kind, ...] = ("sae", "transcoder", "skip-transcoder")


def test_pseudo_derivatives_are_those_of_the_paper() -> None:
    """A slow reference, latent by latent: eq. 11 and 12, with a rectangle as the kernel."""
    generator = torch.Generator().manual_seed(0)
    z_BM = torch.randn(40, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    theta_M = torch.tensor([0.1, 0.2, 0.3, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    of_act_BM, of_active_BM = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    act_BM, is_active_BM = jump_relu(z_BM, theta_M, 0.4)
    assert torch.equal(act_BM, torch.where(z_BM > theta_M, z_BM, 0))
    assert torch.equal(is_active_BM, (z_BM > theta_M).double())
    loss = (act_BM * of_act_BM + is_active_BM * of_active_BM).sum()
    dz_BM, dtheta_M = torch.autograd.grad(loss, (z_BM, theta_M))
    expected_M = torch.zeros(5, dtype=torch.float64)
    for row in range(40):
        for m in range(5):
            z, theta = z_BM[row, m].item(), theta_M[m].item()
            assert dz_BM[row, m] == (of_act_BM[row, m] if z > theta else 0)
            if -0.5 < (z - theta) / 0.4 < 0.5:
                expected_M[m] -= (theta * of_act_BM[row, m] + of_active_BM[row, m]) / 0.4
    assert (expected_M != 0).all()
    torch.testing.assert_close(dtheta_M, expected_M)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_dense_codes(kind: Kind) -> None:
    """Equal to float64 autograd far from thresholds; gradients of thresholds excepted."""
    trainer = make_learner(replace(JUMP, kind=kind, bandwidth=1e-9))
    train_(trainer, 0, 5)
    coder, total = trainer.coder.double(), trainer.objective.total_variance
    encoder = coder.encoder
    assert isinstance(encoder, JumpReluEncoder)
    x_BD, y_BE = (t.double() for t in rows_of(coder.config, 16, 9))

    def dense_loss() -> Tensor:
        z_BM = (x_BD - coder.b_D) @ encoder.encoder_MD.T + encoder.bias_M
        is_active_BM = z_BM > encoder.threshold_M.abs()
        y_hat_BE = (z_BM * is_active_BM) @ coder.decoder_ME + coder.decode_offset(x_BD)
        errors_B = (y_BE - y_hat_BE).square().sum(1) / total
        return (errors_B + coder.config.sparsity_weight * is_active_BM.sum(1)).mean()

    losses = [batch_loss(trainer, x_BD, y_BE), dense_loss()]
    parameters = [p for name, p in coder.named_parameters() if not name.endswith("threshold_M")]
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in losses)
    torch.testing.assert_close(*losses)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_thresholds_are_those_of_dense_codes(kind: Kind, nested: bool) -> None:
    """The loss of the prediction counts on both sides of a threshold, as in eq. 11."""
    trainer = make_learner(replace(JUMP, kind=kind, nested=nested))
    train_(trainer, 0, 5)
    coder, total = trainer.coder.double(), trainer.objective.total_variance
    encoder = coder.encoder
    assert isinstance(encoder, JumpReluEncoder)
    x_BD, y_BE = (t.double() for t in rows_of(coder.config, 16, 9))
    (ours_M,) = torch.autograd.grad(batch_loss(trainer, x_BD, y_BE), encoder.threshold_M)
    z_BM = (x_BD - coder.b_D) @ encoder.encoder_MD.T + encoder.bias_M
    act_BM, is_active_BM = jump_relu(z_BM, encoder.threshold_M.abs(), 0.2)
    assert (((z_BM - encoder.threshold_M.abs()).abs() < 0.1) & (is_active_BM == 0)).any()
    loss = coder.config.sparsity_weight * is_active_BM.sum(1).mean()
    counts = [round(share * 36) for share in NESTED_SHARES] if nested else [36]
    for count in counts:
        y_hat_BE = act_BM[:, :count] @ coder.decoder_ME[:count] + coder.decode_offset(x_BD)
        loss = loss + (y_BE - y_hat_BE).square().sum(1).mean() / total / len(counts)
    (theirs_M,) = torch.autograd.grad(loss, encoder.threshold_M)
    torch.testing.assert_close(ours_M, theirs_M, atol=1e-12, rtol=1e-9)


def test_latents_just_below_their_threshold_are_not_active() -> None:
    trainer = make_learner(JUMP)
    x_BD, y_BE = rows_of(JUMP, 64, 1)
    code = trainer.coder.encode(x_BD)
    assert ((code.idx_BK >= 0) & (code.val_BK == 0)).any()
    with torch.no_grad():
        expected = trainer.coder.encode(x_BD)
    assert ((expected.idx_BK >= 0) == (expected.val_BK > 0)).all()
    result = trainer.step(x_BD, y_BE)
    assert result.l0 == (expected.val_BK > 0).sum(1).double().mean()
    fired = expected.idx_BK.unique()
    assert torch.equal(trainer.usage.rows_since_fired_M == 0, torch.isin(torch.arange(36), fired))


@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind: Kind) -> None:
    trainer = make_learner(replace(JUMP, kind=kind, lr=2e-2))
    encoder = trainer.coder.encoder
    assert isinstance(encoder, JumpReluEncoder)
    assert torch.equal(encoder.threshold_M, torch.full((36,), 0.2)), "the bandwidth"
    fvus = fvus_of(trainer)
    assert sum(fvus[-5:]) < 0.7 * sum(fvus[:5])
    assert len(encoder.threshold_M.unique()) > 18, "thresholds learn"


def test_a_larger_weight_gives_sparser_codes_and_the_code_is_the_activation() -> None:
    latents = []
    x_BD, _ = rows_of(JUMP, 100, 99)
    for weight in (0.0, 0.03):
        trainer = make_learner(replace(JUMP, sparsity_weight=weight, lr=2e-2))
        train_(trainer, 0, 60)
        encoder, b_D = trainer.coder.encoder, trainer.coder.b_D
        assert isinstance(encoder, JumpReluEncoder)
        with torch.no_grad():
            code = trainer.coder.encode(x_BD)
        z_BM = (x_BD - b_D) @ encoder.encoder_MD.T + encoder.bias_M
        expected_BM = torch.where(z_BM > encoder.threshold_M.abs(), z_BM, 0)
        assert torch.equal(reference.dense(code.idx_BK, code.val_BK, 36), expected_BM)
        latents.append(float((code.idx_BK >= 0).sum()))
    assert latents[1] < 0.7 * latents[0]


def test_the_bandwidth_changes_the_training() -> None:
    losses = [train_(make_learner(replace(JUMP, bandwidth=b)), 0, 8) for b in (0.2, 0.4)]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="bandwidth must be positive and finite, got 0"):
        replace(JUMP, bandwidth=0.0)
