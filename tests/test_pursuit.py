"""Matching pursuit: against its references, and the laws that it obeys."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from mptrain.coder import Coder
from mptrain.config import Backend, CoderConfig, ScoreDtype
from mptrain.pursuit import atoms as atoms_module
from mptrain.pursuit import pursue as pursue_module
from mptrain.pursuit import search as search_module
from mptrain.pursuit.atoms import largest
from mptrain.pursuit.pursue import pursue
from mptrain.pursuit.search import Search, resolve
from mptrain.pursuit.select import select

CONFIG = CoderConfig(hookpoint="h", kind="sae", arch="mp", k=2, expansion=2)
DIRECT = Search(backend="direct", shortlist_size=10**6, shortlist_refresh=1, score_dtype="float32")
GRAM = replace(DIRECT, backend="gram")
WHOLE = replace(DIRECT, backend="shortlist")  # of all atoms, anew at every step
EXACT = (DIRECT, GRAM, WHOLE, replace(WHOLE, score_dtype="bfloat16"))
SHORT = replace(WHOLE, shortlist_size=3, shortlist_refresh=2)
BFLOAT16 = replace(SHORT, score_dtype="bfloat16")
EVERY = (*EXACT, SHORT, BFLOAT16)


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


@given(sizes, st.integers(1, 9), st.sampled_from([1e-6, 0.3]), st.sampled_from(EXACT))
@settings(max_examples=200, deadline=None)
def test_equals_reference(sizes: dict[str, int], k: int, tolerance: float, search: Search):
    x_BD, W_MD = problem(**sizes)
    idx_BK, val_BK, residual_BD = select(x_BD, W_MD, k, tolerance, search)
    expected = reference.pursue(x_BD.numpy(), W_MD.numpy(), k, tolerance)
    certain_BK = (expected.val_BK > NOISE) | (np.abs(val_BK.numpy()) > NOISE)
    np.testing.assert_array_equal(idx_BK.numpy()[certain_BK], expected.idx_BK[certain_BK])
    np.testing.assert_allclose(val_BK, expected.val_BK, atol=1e-12)
    np.testing.assert_allclose(residual_BD, expected.residual_BD, atol=1e-12)


@given(sizes, st.integers(1, 20), st.sampled_from(EVERY))
@settings(max_examples=300, deadline=None)
def test_laws_in_float32(sizes: dict[str, int], k: int, search: Search):
    """Also past the rank, and with every atom twice."""
    x_BD, W_MD = problem(**sizes, dtype=torch.float32)
    W_MD = torch.cat([W_MD, W_MD])
    norm_B = x_BD.norm(dim=1)
    for steps in range(1, k + 1, 4):
        idx_BK, val_BK, residual_BD = select(x_BD, W_MD, steps, 0.0, search)
        assert val_BK.dtype == residual_BD.dtype == torch.float32
        assert ((idx_BK >= 0) == (val_BK > 0)).all()
        assert (val_BK >= 0).all()
        used_BK = idx_BK >= 0
        assert (used_BK[:, 1:] <= used_BK[:, :-1]).all(), "a stopped row stays stopped"
        assert (residual_BD.norm(dim=1) <= norm_B * (1 + 1e-6)).all(), "the residual never grows"
        norm_B = residual_BD.norm(dim=1)
        prediction_BD = reference.dense(idx_BK, val_BK, len(W_MD)) @ W_MD
        torch.testing.assert_close(prediction_BD + residual_BD, x_BD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("search", EVERY)
@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.ones(3, 4)])
def test_constant_rows_give_no_nan(search: Search, x: Tensor):
    _, W_MD = problem(0, 3, 4, 7, torch.float32)
    W_MD.requires_grad_()
    idx_BK, val_BK, residual_BD = pursue(x, W_MD, 9, 0.0, search)
    (val_BK.sum() + residual_BD.sum()).backward()
    assert val_BK.isfinite().all()
    assert residual_BD.isfinite().all()
    assert W_MD.grad is not None
    assert W_MD.grad.isfinite().all()
    if (x == 0).all():
        assert (idx_BK == -1).all()


@pytest.mark.parametrize("search", EVERY)
def test_a_nan_stays_in_its_row_and_shows(search: Search):
    x_BD, W_MD = problem(0, 5, 8, 20, torch.float32)
    clean = select(x_BD, W_MD, 4, 0.0, search)
    x_BD[3, 2] = torch.nan
    spoilt = select(x_BD, W_MD, 4, 0.0, search)
    assert spoilt[1][3].isnan().all()
    others = torch.tensor([0, 1, 2, 4])
    for before, after in zip(clean, spoilt, strict=True):
        torch.testing.assert_close(before[others], after[others], atol=0, rtol=0)


@pytest.mark.parametrize("search", EVERY)
def test_microbatch_does_not_matter(search: Search, monkeypatch: pytest.MonkeyPatch):
    x_BD, W_MD = problem(3, 23, 8, 40)
    weight_BD = torch.randn(23, 8, dtype=torch.float64)

    def result() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        W = W_MD.clone().requires_grad_()
        idx_BK, val_BK, residual_BD = pursue(x_BD, W, 5, 0.0, search)
        (val_BK.sum() + (residual_BD * weight_BD).sum()).backward()
        assert W.grad is not None
        return idx_BK, val_BK, residual_BD, W.grad

    whole = result()
    small = dict.fromkeys(("direct", "gram", "shortlist"), 5 * 40)
    monkeypatch.setattr(search_module, "_CPU_ELEMENTS", small)
    monkeypatch.setattr(atoms_module, "_CPU_PIECE", 2 * 8 * 4)
    monkeypatch.setattr(pursue_module, "_ELEMENTS", 7 * 8)
    for a, b in zip(whole, result(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gram_equals_direct_in_float32():
    x_BD, W_MD = problem(5, 300, 48, 400, torch.float32)
    idx_BK, val_BK, residual_BD = select(x_BD, W_MD, 24, 0.0, DIRECT)
    gram_idx_BK, gram_val_BK, gram_residual_BD = select(x_BD, W_MD, 24, 0.0, GRAM)
    same_B = (idx_BK == gram_idx_BK).all(1)
    assert same_B.float().mean() > 0.99, "rounding may decide a near tie, rarely"
    torch.testing.assert_close(val_BK[same_B], gram_val_BK[same_B], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(residual_BD[same_B], gram_residual_BD[same_B], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("atoms_twice", [False, True])
def test_shortlist_agrees_with_direct_on_sums_of_atoms(dtype: ScoreDtype, atoms_twice: bool):
    """As far as README says, with the defaults; whether an atom or its double is no difference."""
    generator = torch.Generator().manual_seed(8)
    _, W_MD = problem(4, 1, 256, 2048, torch.float32)
    x_BD = sums_of_atoms(generator, W_MD, 512, 16)
    defaults = Coder(replace(CONFIG, backend="shortlist", score_dtype=dtype), 8, 8).search
    if atoms_twice:
        W_MD = torch.cat([W_MD, W_MD])
    idx_BK, _, residual_BD = select(x_BD, W_MD, 24, 0.0, DIRECT)
    short_idx_BK, _, short_residual_BD = select(x_BD, W_MD, 24, 0.0, defaults)
    assert (idx_BK % 2048 == short_idx_BK % 2048)[:, :16].float().mean() > 0.998
    error, short_error = residual_BD.square().sum(), short_residual_BD.square().sum()
    assert float(short_error) == pytest.approx(float(error), rel=1e-3)


def sums_of_atoms(generator: torch.Generator, W_MD: Tensor, B: int, L: int) -> Tensor:
    """Rows of L atoms each, with some noise."""
    M, D = W_MD.shape
    idx_BL = torch.randint(M, (B, L), generator=generator)
    val_BL = 0.2 + torch.rand(B, L, generator=generator)
    noise_BD = 0.02 * torch.randn(B, D, generator=generator)
    return reference.dense(idx_BL, val_BL, M) @ W_MD + noise_BD


@pytest.mark.parametrize("change", [{"shortlist_size": 2}, {"shortlist_refresh": 4}])
def test_a_smaller_or_older_shortlist_chooses_otherwise(change: dict[str, int]):
    x_BD, W_MD = problem(5, 100, 16, 100, torch.float32)
    base = replace(SHORT, shortlist_size=8)
    before, after = (select(x_BD, W_MD, 8, 0.0, s) for s in (base, replace(base, **change)))
    assert not torch.equal(before[0], after[0])
    assert before[2].square().sum() < after[2].square().sum(), "and worse"


def test_bfloat16_chooses_the_shortlist_only():
    """Values and residual are of float32 precision, and so is the choice within the list."""
    x_BD, W_MD = problem(5, 100, 16, 100, torch.float32)
    coarse = replace(BFLOAT16, shortlist_size=50)
    idx_BK, val_BK, _ = select(x_BD, W_MD, 8, 0.0, coarse)
    exact_idx_BK, exact_val_BK, _ = select(x_BD, W_MD, 8, 0.0, replace(SHORT, shortlist_size=50))
    same_B = (idx_BK == exact_idx_BK).all(1)
    assert same_B.float().mean() > 0.98
    torch.testing.assert_close(val_BK[same_B], exact_val_BK[same_B], atol=1e-6, rtol=1e-5)
    short, long = (select(x_BD, W_MD, 8, 0.0, s)[0] for s in (SHORT, BFLOAT16))
    assert not torch.equal(short, long), "at the end of a list of three it does show"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shortlist_without_a_gram_matrix(dtype: ScoreDtype, monkeypatch: pytest.MonkeyPatch):
    """Past 16384 latents the scores come from the residual, in float32 too."""
    x_BD, W_MD = problem(5, 40, 16, 100, torch.float32)
    search = replace(SHORT, shortlist_size=12, score_dtype=dtype)
    expected = select(x_BD, W_MD, 8, 0.0, replace(search, score_dtype="float32"))
    monkeypatch.setattr(search_module, "_GRAM_BYTES", 0)
    found = select(x_BD, W_MD, 8, 0.0, search)
    assert (expected[0] == found[0]).float().mean() > 0.97
    assert float(found[2].square().sum()) == pytest.approx(
        float(expected[2].square().sum()), rel=1e-2
    )


@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 400), st.data())
@settings(max_examples=200, deadline=None)
def test_largest_are_the_largest(seed: int, b: int, M: int, data: st.DataObject):
    size = data.draw(st.integers(1, M))
    score_bM = torch.randn(b, M, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    idx_bS = largest(score_bM, size)
    assert all(len(set(row)) == size for row in idx_bS.tolist())
    found_bS = score_bM.gather(1, idx_bS).sort(1, descending=True).values
    assert torch.equal(found_bS, score_bM.topk(size).values)


def test_auto_goes_by_the_number_of_latents():
    assert resolve("auto", 1) == resolve("auto", 16384) == "gram"
    assert resolve("auto", 16385) == "direct"
    given: tuple[Backend, ...] = ("direct", "gram", "shortlist")
    assert all(resolve(one, M) == one for one in given for M in (1, 10**6))


@given(sizes, st.integers(1, 9), st.sampled_from([1e-6, 0.3]), st.sampled_from(EXACT))
@settings(max_examples=100, deadline=None)
def test_gradients_equal_autograd(sizes: dict[str, int], k: int, tolerance: float, search: Search):
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

    ours = gradients(lambda x, W: pursue(x, W, k, tolerance, search))
    plain = gradients(lambda x, W: reference.pursue_with_graph(x, W, k, tolerance))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@given(sizes, st.integers(1, 9), st.sampled_from(EVERY), st.booleans())
@settings(max_examples=100, deadline=None)
def test_gradients_hold_the_choice_fixed(
    sizes: dict[str, int], k: int, search: Search, detach: bool
):
    x_BD, W_MD = (t.requires_grad_() for t in problem(**sizes))
    idx_BK, val_BK, residual_BD = pursue(x_BD, W_MD, k, 0.0, search, detach)
    assume(((val_BK == 0) | (val_BK > NOISE)).all())
    followed = reference.follow(x_BD, W_MD, idx_BK, detach)
    ours, plain = (
        torch.autograd.grad(val.square().sum() + r.pow(3).sum(), (x_BD, W_MD))
        for val, r in ((val_BK, residual_BD), followed)
    )
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("search", EVERY)
@pytest.mark.parametrize("output", [1, 2])
def test_gradcheck(search: Search, output: int):
    """Finite differences, of the values alone and of the residual alone."""
    x_BD, W_MD = problem(2, 3, 5, 6)
    x_BD[1] = 0.5
    x_BD.requires_grad_()
    W_MD.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, W: pursue(x, W, 3, 0.0, search)[output], (x_BD, W_MD))


@pytest.mark.parametrize("search", [DIRECT, GRAM, SHORT, BFLOAT16])
def test_little_is_kept_for_the_backward_pass(search: Search):
    B, D, M, K = 256, 256, 8192, 32
    x_BD, W_MD = problem(0, B, D, M, torch.float32)
    W_MD.requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, val_BK, residual_BD = pursue(x_BD, W_MD, K, 0.0, search)
        loss = val_BK.sum() + residual_BD.square().sum()
    others = [t for t in kept if t.data_ptr() != W_MD.data_ptr()]
    assert len(others) < len(kept), "the dictionary is kept by reference"
    assert all(t.numel() < B * M and t.numel() < K * B * D for t in others)
    assert sum(t.nbytes for t in others) < 1_000_000
    loss.backward()
    assert W_MD.grad is not None
    assert W_MD.grad.dtype == torch.float32
