"""How dead latents predict the error, against dense formulas."""

import pytest
import torch
from torch import Tensor

from mptrain.coders.auxk import error_by_encoder, error_by_residual

DEAD = torch.tensor([True, True, *[False] * 7])


def parameters(B: int = 4, D: int = 6, M: int = 9) -> tuple[Tensor, ...]:
    """x, b, encoder, bias and decoder."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, D), (D,), (M, D), (M,), (M, D - 1))
    tensors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(t.requires_grad_() for t in tensors)


def test_nothing_dead_predicts_no_error():
    x, b, W, bias, V = parameters()
    assert error_by_encoder(x, b, W, bias, V, DEAD & ~DEAD) is None
    assert error_by_residual(x, W, W, V, DEAD & ~DEAD) is None


def test_encoder_predicts_by_dead_latents_alone():
    x, b, W, bias, V = parameters()
    predicted = error_by_encoder(x, b, W, bias, V, DEAD)
    assert predicted is not None
    error_hat_BE, scale = predicted
    assert scale == pytest.approx(2 / 3), "two dead latents of k_aux = 3"
    code_BM = torch.relu((x - b) @ W.T + bias) * DEAD
    torch.testing.assert_close(error_hat_BE, code_BM @ V)
    error_hat_BE.square().sum().backward()
    only_dead_learn(W, bias, V)


def test_residual_predicts_by_dead_atoms_alone():
    r, _, W, _, V = parameters()
    predicted = error_by_residual(r.detach(), W, W, V, DEAD)
    assert predicted is not None
    error_hat_BE, scale = predicted
    assert scale == pytest.approx(2 / 3)
    expected_BE = fitted_code(r, W, 2) @ V
    torch.testing.assert_close(error_hat_BE, expected_BE)
    ours = torch.autograd.grad(error_hat_BE.square().sum(), (W, V), retain_graph=True)
    plain = torch.autograd.grad(expected_BE.square().sum(), (W, V))
    torch.testing.assert_close(ours, plain)
    error_hat_BE.square().sum().backward()
    only_dead_learn(W, V)


def fitted_code(r: Tensor, W: Tensor, k: int) -> Tensor:
    """Correlations of the `k` best dead atoms, scaled to fit `r` best."""
    score_BM = torch.relu(r.detach() @ W.T) * DEAD
    code_BM = score_BM * (score_BM >= score_BM.topk(k, 1).values[:, -1:])
    sum_BD = (code_BM @ W).detach()
    fit_B1 = (r.detach() * sum_BD).sum(1, keepdim=True) / sum_BD.square().sum(1, keepdim=True)
    return fit_B1.nan_to_num(0) * code_BM


def test_a_fit_never_worsens_the_residual_of_an_sae():
    """Eight dead atoms that are nearly equal: their plain sum would be eight times too long."""
    r_BD, _, W_MD, _, _ = (t.detach() for t in parameters())
    W_MD = W_MD[:1] + 0.01 * W_MD
    W_MD /= W_MD.norm(dim=1, keepdim=True)
    predicted = error_by_residual(r_BD, W_MD, W_MD, W_MD, torch.arange(9) > 0)
    assert predicted is not None
    left_BD = r_BD - predicted[0]
    assert (left_BD.norm(dim=1) <= r_BD.norm(dim=1) + 1e-12).all()
    assert (left_BD.norm(dim=1) < r_BD.norm(dim=1) - 1e-3).any()


def test_a_zero_residual_gives_no_nan():
    _, _, W, _, V = parameters()
    predicted = error_by_residual(torch.zeros(4, 6, dtype=torch.float64), W, W, V, DEAD)
    assert predicted is not None
    predicted[0].sum().backward()
    assert W.grad is not None
    assert (predicted[0] == 0).all()
    assert W.grad.isfinite().all()


def only_dead_learn(*parameters: Tensor) -> None:
    for parameter in parameters:
        assert parameter.grad is not None
        assert (parameter.grad[~DEAD] == 0).all()
        assert (parameter.grad[DEAD] != 0).any()
