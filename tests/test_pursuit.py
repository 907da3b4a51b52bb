"""Matching pursuit: against its references, and the laws that it obeys."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from mptrain.config import Backend
from mptrain.pursuit import pursue as pursue_module
from mptrain.pursuit import select as select_module
from mptrain.pursuit.pursue import pursue
from mptrain.pursuit.select import select

BACKENDS: tuple[Backend, ...] = ("direct", "gram")


def unit(W_MD: Tensor) -> Tensor:
    return W_MD / W_MD.norm(dim=1, keepdim=True)


def problem(
    seed: int, B: int, D: int, M: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random rows, one of them zero where there are several, and unit-norm atoms."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(B, D, generator=generator, dtype=dtype)
    x_BD[1:2] = 0
    return x_BD, unit(torch.randn(M, D, generator=generator, dtype=dtype))


sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "B": st.integers(1, 9),
        "D": st.integers(1, 6),
        "M": st.integers(1, 14),
    }
)


NOISE = 1e-9  # a best correlation below this is rounding, and so is whether it is positive


@given(sizes, st.integers(1, 9), st.sampled_from([1e-6, 0.3]), st.sampled_from(BACKENDS))
@settings(max_examples=200, deadline=None)
def test_equals_reference(sizes: dict[str, int], k: int, tolerance: float, backend: Backend):
    x_BD, W_MD = problem(**sizes)
    idx_BK, val_BK, residual_BD = select(x_BD, W_MD, k, tolerance, backend)
    expected = reference.pursue(x_BD.numpy(), W_MD.numpy(), k, tolerance)
    certain_BK = (expected.val_BK > NOISE) | (np.abs(val_BK.numpy()) > NOISE)
    np.testing.assert_array_equal(idx_BK.numpy()[certain_BK], expected.idx_BK[certain_BK])
    np.testing.assert_allclose(val_BK, expected.val_BK, atol=1e-12)
    np.testing.assert_allclose(residual_BD, expected.residual_BD, atol=1e-12)


@given(sizes, st.integers(1, 20), st.sampled_from(BACKENDS))
@settings(max_examples=200, deadline=None)
def test_laws_in_float32(sizes: dict[str, int], k: int, backend: Backend):
    """Also past the rank, and with every atom twice."""
    x_BD, W_MD = problem(**sizes, dtype=torch.float32)
    W_MD = torch.cat([W_MD, W_MD])
    norm_B = x_BD.norm(dim=1)
    for steps in range(1, k + 1, 4):
        idx_BK, val_BK, residual_BD = select(x_BD, W_MD, steps, 0.0, backend)
        assert val_BK.dtype == residual_BD.dtype == torch.float32
        assert ((idx_BK >= 0) == (val_BK > 0)).all()
        assert (val_BK >= 0).all()
        used_BK = idx_BK >= 0
        assert (used_BK[:, 1:] <= used_BK[:, :-1]).all(), "a stopped row stays stopped"
        assert (residual_BD.norm(dim=1) <= norm_B * (1 + 1e-6)).all(), "the residual never grows"
        norm_B = residual_BD.norm(dim=1)
        prediction_BD = reference.dense(idx_BK, val_BK, len(W_MD)) @ W_MD
        torch.testing.assert_close(prediction_BD + residual_BD, x_BD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.ones(3, 4)])
def test_constant_rows_give_no_nan(backend: Backend, x: Tensor):
    _, W_MD = problem(0, 3, 4, 7, torch.float32)
    W_MD.requires_grad_()
    idx_BK, val_BK, residual_BD = pursue(x, W_MD, 9, 0.0, backend)
    (val_BK.sum() + residual_BD.sum()).backward()
    assert val_BK.isfinite().all()
    assert residual_BD.isfinite().all()
    assert W_MD.grad is not None
    assert W_MD.grad.isfinite().all()
    if (x == 0).all():
        assert (idx_BK == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row_and_shows(backend: Backend):
    x_BD, W_MD = problem(0, 5, 8, 20, torch.float32)
    clean = select(x_BD, W_MD, 4, 0.0, backend)
    x_BD[3, 2] = torch.nan
    spoilt = select(x_BD, W_MD, 4, 0.0, backend)
    assert spoilt[1][3].isnan().all()
    others = torch.tensor([0, 1, 2, 4])
    for before, after in zip(clean, spoilt, strict=True):
        torch.testing.assert_close(before[others], after[others], atol=0, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_microbatch_does_not_matter(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    x_BD, W_MD = problem(3, 23, 8, 40)
    weight_BD = torch.randn(23, 8, dtype=torch.float64)

    def result() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        W = W_MD.clone().requires_grad_()
        idx_BK, val_BK, residual_BD = pursue(x_BD, W, 5, 0.0, backend)
        (val_BK.sum() + (residual_BD * weight_BD).sum()).backward()
        assert W.grad is not None
        return idx_BK, val_BK, residual_BD, W.grad

    whole = result()
    monkeypatch.setattr(select_module, "_CPU_ELEMENTS", dict.fromkeys(BACKENDS, 5 * 40))
    monkeypatch.setattr(pursue_module, "_ELEMENTS", 7 * 8)
    for a, b in zip(whole, result(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gram_equals_direct_in_float32():
    x_BD, W_MD = problem(5, 300, 48, 400, torch.float32)
    idx_BK, val_BK, residual_BD = select(x_BD, W_MD, 24, 0.0, "direct")
    gram_idx_BK, gram_val_BK, gram_residual_BD = select(x_BD, W_MD, 24, 0.0, "gram")
    same_B = (idx_BK == gram_idx_BK).all(1)
    assert same_B.float().mean() > 0.99, "rounding may decide a near tie, rarely"
    torch.testing.assert_close(val_BK[same_B], gram_val_BK[same_B], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(residual_BD[same_B], gram_residual_BD[same_B], atol=1e-5, rtol=0)


@given(sizes, st.integers(1, 9), st.sampled_from([1e-6, 0.3]), st.sampled_from(BACKENDS))
@settings(max_examples=100, deadline=None)
def test_gradients_equal_autograd(
    sizes: dict[str, int], k: int, tolerance: float, backend: Backend
):
    x_BD, W_MD = problem(**sizes)
    weights = torch.Generator().manual_seed(1)
    weight_BK = torch.randn(len(x_BD), k, generator=weights, dtype=torch.float64)
    weight_BD = torch.randn(x_BD.shape, generator=weights, dtype=torch.float64)

    def gradients(run) -> tuple[Tensor, ...]:
        x, W = x_BD.clone().requires_grad_(), W_MD.clone().requires_grad_()
        _, val_BK, residual_BD = run(x, W)
        assume(((val_BK == 0) | (val_BK > NOISE)).all())
        loss = (val_BK * weight_BK).sum() + (residual_BD * weight_BD).square().sum()
        return torch.autograd.grad(loss, (x, W))

    ours = gradients(lambda x, W: pursue(x, W, k, tolerance, backend))
    plain = gradients(lambda x, W: reference.pursue_with_graph(x, W, k, tolerance))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", [1, 2])
def test_gradcheck(backend: Backend, output: int):
    """Finite differences, of the values alone and of the residual alone."""
    x_BD, W_MD = problem(2, 3, 5, 6)
    x_BD[1] = 0.5
    x_BD.requires_grad_()
    W_MD.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, W: pursue(x, W, 3, 0.0, backend)[output], (x_BD, W_MD)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_little_is_kept_for_the_backward_pass(backend: Backend):
    B, D, M, K = 256, 256, 8192, 32
    x_BD, W_MD = problem(0, B, D, M, torch.float32)
    W_MD.requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, val_BK, residual_BD = pursue(x_BD, W_MD, K, 0.0, backend)
        loss = val_BK.sum() + residual_BD.square().sum()
    others = [t for t in kept if t.data_ptr() != W_MD.data_ptr()]
    assert len(others) < len(kept), "the dictionary is kept by reference"
    assert all(t.numel() < B * M and t.numel() < K * B * D for t in others)
    assert sum(t.nbytes for t in others) < 1_000_000
    loss.backward()
    assert W_MD.grad is not None
    assert W_MD.grad.dtype == torch.float32
