"""Gradient pursuit and orthogonal matching pursuit: against references, and what they are for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from mptrain.pursuit import refit as refit_module
from mptrain.pursuit.refit import Refit, pursue_refit
from mptrain.pursuit.search import Search
from mptrain.pursuit.select import select

DIRECT = Search(backend="direct", shortlist_size=1, shortlist_refresh=1, score_dtype="float32")
CODES: tuple[Refit, ...] = ("gp", "omp")


def problem(
    seed: int, B: int, D: int, M: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random rows, the second of them zero, and unit-norm atoms."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(B, D, generator=generator, dtype=dtype)
    x_BD[1:2] = 0
    W_MD = torch.randn(M, D, generator=generator, dtype=dtype)
    return x_BD, W_MD / W_MD.norm(dim=1, keepdim=True)


sizes = {"seed": st.integers(0, 2**20), "B": st.integers(1, 7), "M": st.integers(1, 14)}


@given(**sizes, D=st.integers(2, 6), k=st.integers(1, 9), tolerance=st.sampled_from([1e-4, 0.4]))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("codes", CODES)
def test_equals_reference(
    codes: Refit, seed: int, B: int, D: int, M: int, k: int, tolerance: float
):
    x_BD, W_MD = problem(seed, B, D, M)
    idx_BK, val_BK, residual_BD = pursue_refit(x_BD, W_MD, k, tolerance, codes)
    code_BM, expected_BD = reference.pursue_refit(x_BD.numpy(), W_MD.numpy(), k, tolerance, codes)
    np.testing.assert_allclose(reference.dense(idx_BK, val_BK, M), code_BM, atol=1e-7)
    np.testing.assert_allclose(residual_BD, expected_BD, atol=1e-8)
    assert ((idx_BK >= 0) == (val_BK != 0)).all()
    if codes == "gp":
        assert (val_BK >= 0).all()


@given(**sizes, D=st.integers(1, 5), k=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("codes", CODES)
def test_laws_in_float32(codes: Refit, seed: int, B: int, D: int, M: int, k: int):
    """Also past the rank, and with every atom twice."""
    x_BD, W_MD = problem(seed, B, D, M, torch.float32)
    W_MD = torch.cat([W_MD, W_MD]).requires_grad_()
    idx_BK, val_BK, residual_BD = pursue_refit(x_BD, W_MD, k, 0.0, codes)
    with torch.no_grad():
        prediction_BD = reference.dense(idx_BK, val_BK, 2 * M) @ W_MD
        torch.testing.assert_close(prediction_BD + residual_BD, x_BD, atol=1e-3, rtol=1e-3)
        assert (residual_BD.norm(dim=1) <= x_BD.norm(dim=1) * (1 + 1e-4)).all()
    (val_BK.sum() + residual_BD.sum()).backward()
    assert W_MD.grad is not None
    assert W_MD.grad.isfinite().all()


@pytest.mark.parametrize("output", [1, 2])
@pytest.mark.parametrize("codes", CODES)
def test_gradcheck(codes: Refit, output: int):
    """Finite differences, of the values alone and of the residual alone; one atom comes twice."""
    x_BD, W_MD = problem(2, 3, 5, 6)
    x_BD[1] = 0.5
    x_BD.requires_grad_()
    W_MD.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, W: pursue_refit(x, W, 4, 0.0, codes)[output], (x_BD, W_MD)
    )


@pytest.mark.parametrize("codes", CODES)
def test_microbatch_does_not_matter(codes: Refit, monkeypatch: pytest.MonkeyPatch):
    x_BD, W_MD = problem(3, 23, 8, 40)

    def result() -> tuple[Tensor, ...]:
        W = W_MD.clone().requires_grad_()
        idx_BK, val_BK, residual_BD = pursue_refit(x_BD, W, 5, 0.0, codes)
        (val_BK.sum() + residual_BD.pow(3).sum()).backward()
        assert W.grad is not None
        return idx_BK, val_BK, residual_BD, W.grad

    whole = result()
    monkeypatch.setattr(refit_module, "_CPU_ELEMENTS", 5 * 40)
    for a, b in zip(whole, result(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("codes", CODES)
def test_a_nan_stays_in_its_row_and_shows(codes: Refit):
    x_BD, W_MD = problem(0, 5, 8, 20, torch.float32)
    clean = pursue_refit(x_BD, W_MD, 4, 0.0, codes)
    x_BD[3, 2] = torch.nan
    spoilt = pursue_refit(x_BD, W_MD, 4, 0.0, codes)
    assert spoilt[2][3].isnan().any()
    others = torch.tensor([0, 1, 2, 4])
    for before, after in zip(clean, spoilt, strict=True):
        torch.testing.assert_close(before[others], after[others], atol=1e-6, rtol=0)


def test_omp_leaves_nothing_that_its_atoms_explain():
    x_BD, W_MD = problem(7, 40, 16, 64)
    idx_BK, _, residual_BD = pursue_refit(x_BD, W_MD, 6, 0.0, "omp")
    left_BK = (W_MD[idx_BK.clamp_min(0)] * residual_BD[:, None]).sum(2)
    assert left_BK.abs().max() < 1e-10
    assert all(len(set(row)) == 6 for row in idx_BK[2:].tolist()), "no atom twice"


def test_gradient_pursuit_lies_between_mp_and_omp():
    """Share of the squares of 200 random rows that is left, D = 64, M = 256, K = 16: mp .291,
    gp .246, omp .231."""
    x_BD, W_MD = problem(0, 200, 64, 256)
    x_BD[1] = 1
    residuals = [select(x_BD, W_MD, 16, 0.0, DIRECT)[2]]
    residuals += [pursue_refit(x_BD, W_MD, 16, 0.0, codes)[2] for codes in CODES]
    left = [float((r.square().sum(1) / x_BD.square().sum(1)).mean()) for r in residuals]
    assert left == pytest.approx([0.291, 0.246, 0.231], abs=6e-4)
