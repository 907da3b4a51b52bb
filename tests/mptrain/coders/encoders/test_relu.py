"""ReLU coders with an L1 penalty.

B rows in a batch, D input width, E target width, M latents.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mptrain.coders.encoders.relu import sparse_code
from mptrain.config.sides import Kind
from mptrain.training.train_step import CoderTrainer
from tests.helpers import reference
from tests.helpers.trainers import BASE, batch_loss, fvus_of, make_learner, rows_of, train_

RELU = replace(BASE, arch="relu", k=None)
KINDS: tuple[Kind, ...] = ("sae", "transcoder", "skip-transcoder")


def dense_loss(trainer: CoderTrainer, x_BD: Tensor, y_BE: Tensor) -> Tensor:
    """The published loss, on dense codes."""
    coder, total = trainer.coder, trainer.objective.total_variance
    encoder = coder.encoder
    act_BM = ((x_BD - coder.b_D) @ encoder.encoder_MD.T + encoder.bias_M).relu()
    y_hat_BE = act_BM @ coder.decoder_ME + coder.decode_offset(x_BD)
    l1_B = (act_BM * coder.decoder_ME.norm(dim=1)).sum(1)
    errors_B = (y_BE - y_hat_BE).square().sum(1) / total
    return (errors_B + coder.config.sparsity_weight * l1_B / total**0.5).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_dense_codes(kind: Kind) -> None:
    trainer = make_learner(replace(RELU, kind=kind, sparsity_weight=0.05))
    train_(trainer, 0, 5)  # a transcoder's decoder has left its zeros
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
    trainer = make_learner(replace(RELU, kind=kind, lr=2e-2))
    fvus = fvus_of(trainer)
    assert sum(fvus[-5:]) < 0.7 * sum(fvus[:5])
    assert trainer.coder.config.name.startswith(
        f"h-output-{kind}-relu-x3" if kind != "sae" else "h-sae-relu-x3"
    )


def test_a_larger_weight_gives_sparser_codes() -> None:
    latents = []
    for weight in (0.0, 0.3):
        trainer = make_learner(replace(RELU, sparsity_weight=weight, lr=2e-2))
        train_(trainer, 0, 60)
        code = trainer.coder.encode(rows_of(RELU, 100, 99)[0])
        latents.append(float((code.idx_BK >= 0).sum()))
    assert latents[1] < 0.7 * latents[0]


def test_entries_are_the_positive_activations() -> None:
    act_BM = torch.randn(7, 9).relu()
    act_BM[2] = 0
    code = sparse_code(act_BM)
    assert code.idx_BK.shape == (7, int((act_BM > 0).sum(1).max()))
    assert torch.equal(reference.dense(code.idx_BK, code.val_BK, 9), act_BM)
    assert ((code.idx_BK < 0) == (code.val_BK == 0)).all()
    assert sparse_code(act_BM[:0]).idx_BK.shape == (0, 1)
    assert (sparse_code(act_BM[2:3]).idx_BK == -1).all()


def test_k_is_refused() -> None:
    with pytest.raises(ValueError, match="k has no effect on arch=relu, got k=3; remove k"):
        replace(RELU, k=3)
    with pytest.raises(ValueError, match="arch=mp needs k, got none"):
        replace(BASE, k=None)
    with pytest.raises(ValueError, match="auxk_alpha has no effect on kind=sae with arch=relu"):
        replace(RELU, auxk_alpha=0.1)
    with pytest.raises(ValueError, match=r"sparsity_weight has no effect .* it applies to relu"):
        replace(BASE, sparsity_weight=0.1)
