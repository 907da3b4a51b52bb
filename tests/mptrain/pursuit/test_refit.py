"""Gradient pursuit and orthogonal matching pursuit: against references, and their benefit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mptrain.pursuit import refit as refit_module
from mptrain.pursuit.forward import pursue_forward
from mptrain.pursuit.refit import Refit, refitted_pursuit
from mptrain.pursuit.rule import Rule
from tests.helpers import reference
from tests.helpers.pursuits import DIRECT, atoms, problem

CODES: tuple[Refit, ...] = ("gp", "omp")
SELECTS = ("positive", "signed", "magnitude")

each_codes = pytest.mark.parametrize("codes", CODES)
each_select = pytest.mark.parametrize("chosen", SELECTS)

sizes = {"seed": st.integers(0, 2**20), "B": st.integers(1, 7), "M": st.integers(1, 14)}


@given(**sizes, D=st.integers(2, 6), k=st.integers(1, 9), tolerance=st.sampled_from([1e-4, 0.4]))
@settings(max_examples=80)
@each_codes
@each_select
def test_equals_reference(
    codes: Refit, chosen: str, seed: int, B: int, D: int, M: int, k: int, tolerance: float
):
    """For omp by magnitude, the reference is textbook orthogonal matching pursuit."""
    x_BD, W_MD = problem(seed, B, D, M)
    idx_BK, val_BK, residual_BD = refitted_pursuit(x_BD, W_MD, k, Rule(chosen, tolerance), codes)
    code_BM, expected_BD = reference.refitted_pursuit(
        x_BD.numpy(), W_MD.numpy(), k, tolerance, codes, chosen
    )
    np.testing.assert_allclose(reference.dense(idx_BK, val_BK, M), code_BM, atol=1e-7)
    # the effect of such a difference in values of unit-norm atoms
    np.testing.assert_allclose(residual_BD, expected_BD, atol=1e-7 * min(k, M))
    assert ((idx_BK >= 0) == (val_BK != 0)).all()
    if codes == "gp" and chosen == "positive":
        assert (val_BK >= 0).all()


@given(**sizes, D=st.integers(1, 5), k=st.integers(1, 20))
@settings(max_examples=60)
@each_codes
@each_select
def test_laws_in_float32(codes: Refit, chosen: str, seed: int, B: int, D: int, M: int, k: int):
    """Also for K above the rank, and with every atom twice."""
    x_BD, W_MD = problem(seed, B, D, M, torch.float32)
    W_MD = torch.cat([W_MD, W_MD]).requires_grad_()
    idx_BK, val_BK, residual_BD = refitted_pursuit(x_BD, W_MD, k, Rule(chosen), codes)
    with torch.no_grad():
        prediction_BD = reference.dense(idx_BK, val_BK, 2 * M) @ W_MD
        torch.testing.assert_close(prediction_BD + residual_BD, x_BD, atol=1e-3, rtol=1e-3)
        assert (residual_BD.norm(dim=1) <= x_BD.norm(dim=1) * (1 + 1e-4)).all()
    (val_BK.sum() + residual_BD.sum()).backward()
    assert W_MD.grad is not None
    assert W_MD.grad.isfinite().all()


@pytest.mark.parametrize("output", [1, 2])
@each_codes
@each_select
def test_gradcheck(codes: Refit, chosen: str, output: int):
    """Finite differences, of the values alone and of the residual alone; one atom comes twice."""
    x_BD, W_MD = problem(2, 3, 5, 6)
    x_BD[1] = 0.5
    x_BD.requires_grad_()
    W_MD.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, W: refitted_pursuit(x, W, 4, Rule(chosen), codes)[output], (x_BD, W_MD)
    )


@each_codes
@each_select
def test_microbatch_does_not_matter(codes: Refit, chosen: str, monkeypatch: pytest.MonkeyPatch):
    x_BD, W_MD = problem(3, 23, 8, 40)

    def result() -> tuple[Tensor, ...]:
        W = W_MD.clone().requires_grad_()
        idx_BK, val_BK, residual_BD = refitted_pursuit(x_BD, W, 5, Rule(chosen), codes)
        (val_BK.sum() + residual_BD.pow(3).sum()).backward()
        assert W.grad is not None
        return idx_BK, val_BK, residual_BD, W.grad

    expected = result()
    monkeypatch.setattr(refit_module, "_CPU_ELEMENTS", 5 * 40)
    for a, b in zip(expected, result(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@each_codes
@each_select
def test_a_nan_stays_in_its_row_and_shows(codes: Refit, chosen: str):
    x_BD, W_MD = problem(0, 5, 8, 20, torch.float32)
    clean = refitted_pursuit(x_BD, W_MD, 4, Rule(chosen), codes)
    x_BD[3, 2] = torch.nan
    spoilt = refitted_pursuit(x_BD, W_MD, 4, Rule(chosen), codes)
    assert spoilt[2][3].isnan().any()
    others = torch.tensor([0, 1, 2, 4])
    for before, after in zip(clean, spoilt, strict=True):
        torch.testing.assert_close(before[others], after[others], atol=1e-6, rtol=0)


@each_select
def test_omp_leaves_nothing_that_its_atoms_explain(chosen: str):
    x_BD, W_MD = problem(7, 40, 16, 64)
    idx_BK, _, residual_BD = refitted_pursuit(x_BD, W_MD, 6, Rule(chosen), "omp")
    left_BK = (W_MD[idx_BK.clamp_min(0)] * residual_BD[:, None]).sum(2)
    assert left_BK.abs().max() < 1e-10
    assert all(len(set(row)) == 6 for row in idx_BK[2:].tolist()), "no atom twice"


@given(seed=st.integers(0, 2**20), B=st.integers(1, 6), D=st.integers(2, 8), data=st.data())
@settings(max_examples=100, deadline=None)
def test_omp_is_that_of_scikit_learn(seed: int, B: int, D: int, data: st.DataObject):
    """scikit-learn chooses by magnitude."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    M = data.draw(st.integers(1, 3 * D), label="M")
    k = data.draw(st.integers(1, min(D, M)), label="k")
    x_BD, W_MD = problem(seed, B + 1, D, M)
    x_BD = x_BD[torch.arange(B + 1) != 1]  # scikit-learn warns of a row of zeros
    sklearn_MB = linear_model.orthogonal_mp(W_MD.numpy().T, x_BD.numpy().T, n_nonzero_coefs=k)
    expected_BM = sklearn_MB.reshape(M, B).T
    idx_BK, val_BK, residual_BD = refitted_pursuit(x_BD, W_MD, k, Rule("magnitude"), "omp")
    code_BM = reference.dense(idx_BK, val_BK, M).numpy()
    np.testing.assert_array_equal(code_BM != 0, expected_BM != 0)
    np.testing.assert_allclose(code_BM, expected_BM, rtol=1e-6, atol=1e-8)
    left_B = np.linalg.norm(x_BD.numpy() - expected_BM @ W_MD.numpy(), axis=1)
    np.testing.assert_allclose(residual_BD.norm(dim=1), left_B, rtol=1e-7, atol=1e-10)


def test_omp_finds_what_rows_are_made_of():
    """Rows of few atoms of a nearly orthogonal dictionary, with values of either sign."""
    generator = torch.Generator().manual_seed(3)
    W_MD = atoms(generator, 300, 200)
    idx_BK = torch.stack([torch.randperm(300, generator=generator)[:4] for _ in range(30)])
    val_BK = torch.rand(30, 4, generator=generator, dtype=torch.float64) + 0.5
    val_BK *= torch.randint(2, (30, 4), generator=generator) * 2 - 1
    code_BM = reference.dense(idx_BK, val_BK, 300)
    refit_idx_BK, refit_val_BK, residual_BD = refitted_pursuit(
        code_BM @ W_MD, W_MD, 7, Rule("magnitude"), "omp"
    )
    assert residual_BD.abs().max() < 1e-12
    torch.testing.assert_close(reference.dense(refit_idx_BK, refit_val_BK, 300), code_BM)
    assert ((refit_idx_BK >= 0).sum(1) == 4).all(), "a row that is explained stops"


@each_codes
def test_by_magnitude_directions_of_atoms_do_not_matter(codes: Refit):
    x_BD, W_MD = problem(7, 40, 16, 64)
    turned_MD = W_MD * torch.where(torch.arange(64) % 3 == 0, -1, 1)[:, None]
    idx_BK, val_BK, residual_BD = refitted_pursuit(x_BD, W_MD, 6, Rule("magnitude"), codes)
    turned = refitted_pursuit(x_BD, turned_MD, 6, Rule("magnitude"), codes)
    assert torch.equal(turned[0], idx_BK)
    torch.testing.assert_close(torch.where(idx_BK % 3 == 0, -turned[1], turned[1]), val_BK)
    torch.testing.assert_close(turned[2], residual_BD)
    assert (val_BK < 0).any()


@each_codes
@each_select
def test_an_atom_may_correlate_with_the_residual_only(codes: Refit, chosen: str):
    """The product of the atom with the row is exactly 0, and still its value is fitted."""
    x_BD, W_MD = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    idx_BK, _, residual_BD = refitted_pursuit(x_BD, W_MD, 2, Rule(chosen), codes)
    assert idx_BK.tolist() == [[0, 1]]
    expected = reference.refitted_pursuit(x_BD.numpy(), W_MD.numpy(), 2, 0.0, codes, chosen)[1]
    np.testing.assert_allclose(residual_BD, expected, atol=1e-6)
    assert residual_BD.norm() < 0.78


def test_refit_has_no_ban_and_no_blocks():
    x_BD, W_MD = problem(0, 2, 3, 4)
    for rule in (Rule(block=2),):
        with pytest.raises(AssertionError):
            refitted_pursuit(x_BD, W_MD, 2, rule, "gp")


def pursue_counting_twice(x_BD: Tensor, W_MD: Tensor, k: int) -> Tensor:
    """Last residuals of the gradient pursuit of sparsify's branch `mp-sae` (`ito`), row by row.

    The new atom enters with all of its score, and then takes the gradient step too, which was
    worked out for a residual that it had not been taken from. No atom is chosen twice.
    """
    residual_BD = x_BD.numpy().copy()
    for x_D, r_D in zip(x_BD.numpy(), residual_BD, strict=True):
        W_SD, val_S, score_M = np.empty((0, len(x_D))), np.empty(0), W_MD.numpy() @ x_D
        chosen: list[int] = []
        for step in range(k):
            chosen.append(int(score_M.argmax()))
            W_SD = W_MD.numpy()[chosen]
            val_S = np.append(val_S, max(score_M[chosen[-1]], 0))
            if step:
                g_S = W_SD @ r_D
                c_D = g_S @ W_SD
                val_S = np.maximum(val_S + c_D @ r_D / (c_D @ c_D) * g_S, 0)
            r_D[:] = x_D - val_S @ W_SD
            score_M = W_MD.numpy() @ r_D
            score_M[chosen] = -np.inf
    return torch.from_numpy(residual_BD)


@pytest.mark.parametrize(
    ("rows", "k", "expected"),
    [
        ("random", 8, {"twice": 0.5160, "mp": 0.4749, "gp": 0.4596, "omp": 0.4520}),
        ("random", 16, {"twice": 0.2652, "mp": 0.2909, "gp": 0.2457, "omp": 0.2307}),
        ("planted", 8, {"twice": 0.0287, "mp": 0.0250, "gp": 0.0045, "omp": 0.0023}),
        ("planted", 16, {"twice": 0.0017, "mp": 0.0093, "gp": 0.0013, "omp": 0.0012}),
    ],
)
def test_gradient_pursuit_lies_between_mp_and_omp(rows: str, k: int, expected: dict[str, float]):
    """Mean share of its squares that is left of a row, 200 rows, D = 64, M = 256.

    | rows | K | value counted twice | mp | gp | omp |
    |---|---|---|---|---|---|
    | random | 8 | .516 | .475 | .460 | .452 |
    | random | 16 | .265 | .291 | .246 | .231 |
    | sums of 8 atoms | 8 | .029 | .025 | .0045 | .0023 |
    | sums of 8 atoms | 16 | .0017 | .0093 | .0013 | .0012 |

    Counting the new value twice is always worse than gradient pursuit done right, and worse than
    plain matching pursuit where there are few steps, so that little corrects the last of them.
    """
    x_BD, W_MD = problem(0, 200, 64, 256)
    if rows == "planted":  # sums of 8 atoms, values uniform in [0.1, 1.1]
        generator = torch.Generator().manual_seed(1)
        idx_BL = torch.randint(256, (200, 8), generator=generator)
        val_BL = 0.1 + torch.rand(200, 8, generator=generator, dtype=torch.float64)
        x_BD = (val_BL[:, :, None] * W_MD[idx_BL]).sum(1)
    x_BD[1] = 1
    residuals = {
        "mp": pursue_forward(x_BD, W_MD, W_MD, k, Rule(), DIRECT)[2],
        **{codes: refitted_pursuit(x_BD, W_MD, k, Rule(), codes)[2] for codes in CODES},
        "twice": pursue_counting_twice(x_BD, W_MD, k),
    }
    left = {
        name: float((r_BD.square().sum(1) / x_BD.square().sum(1)).mean())
        for name, r_BD in residuals.items()
    }
    assert left == pytest.approx(expected, abs=1e-4)
    assert left["omp"] < left["gp"] < min(left["mp"], left["twice"])
    assert (left["twice"] > left["mp"]) == (k == 8)
