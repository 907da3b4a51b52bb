"""Triton kernels against plain torch: on a GPU where there is one, else in Triton's interpreter."""

import importlib.metadata
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mptrain.kernels import sparse
from mptrain.pursuit import backward as backward_module
from tests.helpers.paths import PROJECT

pytest.importorskip("triton", reason="Triton is not installed: pip install mpcache[triton]")

from mptrain.kernels import sparse_triton
from mptrain.pursuit import triton_search
from mptrain.pursuit.triton_backward import pursue_backward
from mptrain.pursuit.triton_search import Sign, best_atoms, best_candidates
from mptrain.pursuit.triton_steps import gram_steps_, shortlist_steps_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OLD = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7)
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and OLD,
    reason="Triton's interpreter suits NumPy 2.4 from Triton 3.7 on",
)
SIGNS: tuple[Sign, ...] = ("positive", "signed", "magnitude")
SIZES = [(1, 1, 1), (2, 5, 1), (3, 33, 129), (130, 70, 300), (1, 3, 700)]  # B, D, M
close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)

seeds = st.integers(0, 2**20)
signs = st.sampled_from(SIGNS)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def unit(W_MD: Tensor) -> Tensor:
    return W_MD / W_MD.norm(dim=1, keepdim=True)


def integers(*shape: int) -> Tensor:
    """Small integers: their products are exact in every dtype, and many scores are equal."""
    return torch.randint(-3, 4, shape, device=DEVICE).float()


def key(score: Tensor, sign: Sign) -> Tensor:
    return score.abs() if sign == "magnitude" else score


def code(B: int, K: int, M: int) -> tuple[Tensor, Tensor]:
    """A code with repeated latents and unused entries."""
    idx_BK = torch.randint(-1, M, (B, K), device=DEVICE)
    return idx_BK, randn(B, K).masked_fill(idx_BK < 0, 0)


# --- search


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "D", "M"), SIZES)
def test_best_atoms_are_the_first_largest(
    B: int, D: int, M: int, dtype: torch.dtype, sign: Sign
) -> None:
    r_BD, W_MD = integers(B, D), integers(M, D)
    r_BD[1:2] = 0
    atom_B = best_atoms(r_BD, W_MD.to(dtype), sign)
    assert torch.equal(atom_B, key(r_BD @ W_MD.T, sign).argmax(1))


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_programs_that_go_through_many_atoms(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_search, "_PROGRAMS", programs)
    r_BD, W_MD = integers(20, 2), integers(700, 2)
    assert torch.equal(best_atoms(r_BD, W_MD), (r_BD @ W_MD.T).argmax(1))


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_best_atoms_in_float32_are_not_those_of_a_lower_precision(
    precision: triton_search.Precision,
) -> None:
    r_BD, W_MD = randn(100, 64), unit(randn(500, 64))
    score_BM = r_BD.double() @ W_MD.double().T
    atom_B = best_atoms(r_BD, W_MD, "positive", precision)
    assert (score_BM.amax(1) - score_BM.gather(1, atom_B[:, None])[:, 0]).max() < 1e-5
    low_B = best_atoms(r_BD, W_MD.bfloat16())
    assert (score_BM.amax(1) - score_BM.gather(1, low_B[:, None])[:, 0]).max() < 0.1


def test_a_nan_leaves_other_rows_alone() -> None:
    r_BD, W_MD = randn(5, 8), randn(70, 8)
    r_BD[3, 2] = torch.nan
    others = torch.tensor([0, 1, 2, 4], device=DEVICE)
    atom_B, candidate_BS = best_atoms(r_BD, W_MD), best_candidates(r_BD, W_MD, 4)
    assert torch.equal(atom_B[others], best_atoms(r_BD[others], W_MD))
    assert torch.equal(candidate_BS[others], best_candidates(r_BD[others], W_MD, 4))
    assert 0 <= int(atom_B[3]) < 70
    assert len(set(candidate_BS[3].tolist())) == 4


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "D", "M"), [s for s in SIZES if s[0] < 9])
def test_candidates_are_distinct_and_have_the_best(
    B: int, D: int, M: int, dtype: torch.dtype, sign: Sign
) -> None:
    r_BD, W_MD = integers(B, D), integers(M, D)
    r_BD[1:2] = 0
    score_BM = key(r_BD @ W_MD.T, sign)
    for size in {min(5, M), M}:
        candidate_BS = best_candidates(r_BD, W_MD.to(dtype), size, sign)
        assert all(len(set(row)) == size for row in candidate_BS.tolist())
        assert (candidate_BS >= 0).all()
        candidate_score_BS = score_BM.gather(1, candidate_BS).sort(1, descending=True).values
        assert torch.equal(candidate_score_BS[:, 0], score_BM.amax(1))
        if M <= 64 or size == M:  # then every latent is a group
            assert torch.equal(candidate_score_BS, score_BM.topk(size).values)


def test_candidates_of_more_rows_than_a_tile_has() -> None:
    r_BD, W_MD = integers(131, 20), integers(70, 20)
    score_BM = r_BD @ W_MD.T
    candidate_BS = best_candidates(r_BD, W_MD, 2)
    assert torch.equal(score_BM.gather(1, candidate_BS).amax(1), score_BM.amax(1))


@pytest.mark.parametrize("size", [16, 64])
def test_most_of_the_largest_are_candidates(size: int) -> None:
    r_BD, W_MD = randn(40, 24), unit(randn(5000, 24))
    candidate_BS = best_candidates(r_BD, W_MD, size)
    largest_BS = (r_BD @ W_MD.T).topk(size).indices
    hit_BS = (largest_BS[:, :, None] == candidate_BS[:, None]).any(2).float()
    assert hit_BS[:, 0].all()
    assert hit_BS.mean() > 0.87
    assert hit_BS[:, : size // 8].mean() > 0.95


# --- steps


def plain_steps_(
    r_BD: Tensor,
    candidate_BS: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    idx_BR: Tensor,
    val_BR: Tensor,
    stop_norm_B: Tensor,
    sign: Sign,
) -> None:
    """Computes all scores at every step, in float64; `candidate` is sorted."""
    r_BD, W_MD, U_MD = r_BD.double(), W_MD.double(), U_MD.double()
    for step in range(idx_BR.shape[1]):
        p_BS = (W_MD[candidate_BS] * r_BD[:, None]).sum(2)
        best_B1 = key(p_BS, sign).argmax(1, keepdim=True)
        a_B = p_BS.gather(1, best_B1)[:, 0]
        stops_B = (r_BD.norm(dim=1) <= stop_norm_B) | (a_B == 0)
        stops_B |= (a_B <= 0) & (sign == "positive")
        a_B = a_B.masked_fill(stops_B, 0)
        atom_B = candidate_BS.gather(1, best_B1)[:, 0]
        r_BD = r_BD - a_B[:, None] * U_MD[atom_B]
        idx_BR[:, step], val_BR[:, step] = atom_B.masked_fill(stops_B, -1), a_B


@given(
    seeds,
    st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 30)),
    st.integers(1, 5),
    signs,
    st.sampled_from([0.0, 0.6]),
    st.booleans(),
    st.sampled_from(["shortlist", "shortlist by G", "gram"]),
    st.data(),
)
@settings(max_examples=50, deadline=None)
def test_steps_equal_plain_ones(
    seed: int,
    sizes: tuple[int, int, int],
    steps: int,
    sign: Sign,
    tolerance: float,
    shared: bool,
    variant: str,
    data: st.DataObject,
) -> None:
    torch.manual_seed(seed)
    (B, D, M), S = sizes, data.draw(st.integers(1, sizes[2]))
    S = M if variant == "gram" else S
    W_MD = unit(randn(M, D))
    W_MD[M // 2 : M // 2 * 2] = W_MD[: M // 2]  # atoms and their doubles
    U_MD = W_MD if shared else unit(W_MD + 0.3 * randn(M, D))
    x_BD = randn(B, D)
    x_BD[1:2] = 0
    candidate_BS = torch.rand(B, M, device=DEVICE).argsort(1)[:, :S]
    stop_norm_B = tolerance * x_BD.norm(dim=1)
    G_MM = U_MD @ W_MD.T

    expected = torch.full((B, steps), -2, device=DEVICE), randn(B, steps).double()
    listed_BS = candidate_BS.sort(1).values
    plain_steps_(x_BD, listed_BS, W_MD, U_MD, *expected, stop_norm_B.double(), sign)
    # a best correlation that is rounding noise, or a norm at the floor, may stop or continue a row
    unsure = (expected[1] != 0) & (expected[1].abs() < 1e-4)
    assume(not unsure.any())

    r_BD = x_BD.clone()
    wide = torch.full((B, steps + 3), -7, device=DEVICE), randn(B, steps + 2)
    idx_BR, val_BR = wide[0][:, 2:-1], wide[1][:, 1:-1]
    if variant == "gram":
        score_BM = x_BD @ W_MD.T
        before_BM = score_BM.clone()
        gram_steps_(r_BD, score_BM, G_MM, W_MD, U_MD, idx_BR, val_BR, stop_norm_B, sign)
        assert torch.equal(score_BM, before_BM)
    else:
        G = G_MM if variant == "shortlist by G" else None
        shortlist_steps_(
            *(r_BD, candidate_BS, W_MD, U_MD, idx_BR, val_BR, stop_norm_B, sign), G_MM=G
        )
    assert (wide[0][:, :2] == -7).all(), "writes its columns only"
    assert ((idx_BR == -1) == (val_BR == 0)).all()
    taken_BD = (val_BR[:, :, None] * U_MD[idx_BR.clamp_min(0)]).sum(1)
    close(r_BD, x_BD - taken_BD)
    check_code(idx_BR, val_BR, *expected)


def check_code(idx_BR: Tensor, val_BR: Tensor, plain_idx_BR: Tensor, plain_val_BR: Tensor) -> None:
    """The same atoms with close values, except where two atoms are equal up to rounding."""
    same_B = (idx_BR == plain_idx_BR).all(1)
    close(val_BR[same_B].double(), plain_val_BR[same_B])
    if not same_B.all():
        first = (idx_BR != plain_idx_BR).int().argmax(1)[:, None]
        near = (val_BR.double() - plain_val_BR).abs().gather(1, first)[:, 0]
        assert (near[~same_B] < 1e-4).all()


def test_the_lower_of_two_equal_candidates_is_chosen() -> None:
    W_MD = unit(randn(3, 8)).repeat(4, 1)
    x_BD = randn(6, 8)
    candidate_BS = torch.stack([torch.randperm(12, device=DEVICE) for _ in range(6)])
    idx_BR, val_BR = torch.empty(6, 3, dtype=torch.int64, device=DEVICE), randn(6, 3)
    shortlist_steps_(x_BD, candidate_BS, W_MD, W_MD, idx_BR, val_BR, torch.zeros_like(x_BD[:, 0]))
    assert (idx_BR < 3).all()


@pytest.mark.parametrize("sign", SIGNS)
def test_a_nan_shows_in_its_row_only(sign: Sign) -> None:
    x_BD, W_MD = randn(4, 8), unit(randn(20, 8))
    x_BD[2, 5] = torch.nan
    idx_BR, val_BR = torch.zeros(4, 3, dtype=torch.int64, device=DEVICE), randn(4, 3)
    candidate_BS = best_candidates(x_BD, W_MD, 6, sign)
    stop_norm_B = torch.zeros(4, device=DEVICE)
    shortlist_steps_(x_BD, candidate_BS, W_MD, W_MD, idx_BR, val_BR, stop_norm_B, sign)
    assert val_BR[2].isnan().all()
    assert ((idx_BR[2] >= 0) & (idx_BR[2] < 20)).all()
    assert val_BR[[0, 1, 3]].isfinite().all()


def test_many_candidates_are_multiplied_in_tiles() -> None:
    x_BD, W_MD = randn(2, 20), unit(randn(150, 20))
    candidate_BS = torch.stack([torch.randperm(150, device=DEVICE) for _ in range(2)])
    results = []
    for G_MM in (None, W_MD @ W_MD.T):
        r_BD = x_BD.clone()
        idx_BR, val_BR = torch.zeros(2, 6, dtype=torch.int64, device=DEVICE), randn(2, 6)
        stop_norm_B = torch.zeros(2, device=DEVICE)
        shortlist_steps_(
            r_BD, candidate_BS, W_MD, W_MD, idx_BR, val_BR, stop_norm_B, "magnitude", G_MM=G_MM
        )
        results.append((idx_BR, val_BR, r_BD))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


# --- backward pass


def backward_in_torch(
    code: tuple[Tensor, Tensor],
    dval_BK: Tensor,
    residual_BD: Tensor,
    g_BD: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Autograd through the steps of a pursuit whose code is given, in float64."""
    idx_BK, val_BK = code
    W_MD, U_MD = (t.double().requires_grad_() for t in (W_MD.detach(), U_MD.detach()))
    used_BK = idx_BK >= 0
    atom_BK = idx_BK.clamp_min(0)
    start_BD = residual_BD.double() + torch.einsum("bk,bkd->bd", val_BK.double(), U_MD[atom_BK])
    x_BD = start_BD.detach().requires_grad_()
    taken_BD = torch.zeros_like(x_BD)
    loss = x_BD.new_zeros(())
    for step in range(idx_BK.shape[1]):
        r_BD = x_BD - (taken_BD.detach() if detach else taken_BD)
        # the stored value, with the gradient of the computed value
        a_B = (r_BD * W_MD[atom_BK[:, step]]).sum(1) * used_BK[:, step]
        a_B = a_B + (val_BK[:, step] - a_B).detach()
        taken_BD = taken_BD + a_B[:, None] * U_MD[atom_BK[:, step]]
        loss = loss + (a_B * dval_BK[:, step]).sum()
    loss = loss + ((x_BD - taken_BD) * g_BD).sum()
    dx_BD, dW_MD, dU_MD = torch.autograd.grad(loss, (x_BD, W_MD, U_MD), allow_unused=True)
    return dx_BD, dW_MD, dU_MD


@given(
    seeds,
    st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 9), st.integers(1, 6)),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_reverse_equals_autograd(
    seed: int, sizes: tuple[int, int, int, int], shared: bool, detach: bool
) -> None:
    torch.manual_seed(seed)
    B, D, M, K = sizes
    W_MD = unit(randn(M, D))
    U_MD = W_MD if shared else unit(randn(M, D))
    idx_BK, val_BK = code(B, K, M)
    dval_BK, residual_BD, g_BD = randn(B, K), randn(B, D), randn(B, D)
    arguments = dval_BK, residual_BD, g_BD, W_MD, U_MD, detach
    before = [t.clone() for t in (val_BK, residual_BD, g_BD)]
    dx_BD, dW_MD, dU_MD = pursue_backward(idx_BK, val_BK, *arguments)
    expected = backward_in_torch((idx_BK, val_BK), *arguments)
    loose = partial(torch.testing.assert_close, atol=1e-3, rtol=1e-3)  # K steps amplify
    loose(dx_BD.double(), expected[0])
    if shared:
        assert dU_MD is None
        loose(dW_MD.double(), expected[1] + expected[2])
    else:
        assert dU_MD is not None
        loose(dW_MD.double(), expected[1])
        loose(dU_MD.double(), expected[2])
    for old, new in zip(before, (val_BK, residual_BD, g_BD), strict=True):
        assert torch.equal(old, new), "what is given stays as it is"


def test_reverse_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels in (backward_module.numba_backend, backward_module.triton_backend):
        monkeypatch.setattr(kernels, "applies", lambda _: False)
    x_BD, W_MD = randn(9, 40), unit(randn(15, 40))
    idx_BK, val_BK = torch.zeros(9, 4, dtype=torch.int64, device=DEVICE), randn(9, 4)
    stop_norm_B = torch.zeros(9, device=DEVICE)
    gram_steps_(x_BD, x_BD @ W_MD.T, W_MD @ W_MD.T, W_MD, W_MD, idx_BK, val_BK, stop_norm_B)
    dval_BK, g_BD = randn(9, 4), randn(9, 40)
    dx_BD, dW_MD, _ = pursue_backward(idx_BK, val_BK, dval_BK, x_BD, g_BD, W_MD, W_MD)
    torch_dx_BD, torch_dW_MD, _ = backward_module.pursue_backward(
        idx_BK, val_BK, dval_BK, x_BD, g_BD, W_MD, W_MD, False
    )
    close(dx_BD, torch_dx_BD)
    close(dW_MD, torch_dW_MD)


@pytest.mark.parametrize("shared", [True, False])
def test_scratch_changes_no_bit(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run changes no bit either, with latents whose entries are summed in pieces."""
    monkeypatch.setattr(sparse_triton, "_PIECE", 8)
    W_MD = unit(randn(5, 100))
    U_MD = W_MD if shared else unit(randn(5, 100))
    idx_BK, val_BK = code(20, 6, 5)
    rest = randn(20, 6), randn(20, 100), randn(20, 100), W_MD, U_MD
    first, again, small = (
        pursue_backward(idx_BK, val_BK, *rest, scratch=scratch) for scratch in (1 << 30, 1 << 30, 1)
    )
    for first_tensor, second_tensor, third_tensor in zip(first, again, small, strict=True):
        if first_tensor is None:
            assert shared
            assert second_tensor is third_tensor is None
            continue
        assert torch.equal(first_tensor, second_tensor)
        assert torch.equal(first_tensor, third_tensor)


# --- products with codes


@given(
    seeds,
    st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 30), st.integers(1, 40)),
)
@settings(max_examples=40, deadline=None)
def test_sparse_products_equal_those_in_torch(seed: int, sizes: tuple[int, int, int, int]) -> None:
    torch.manual_seed(seed)
    B, K, M, D = sizes
    idx_BK, val_BK = code(B, K, M)
    V_MD, x_BD = randn(M, D), randn(B, D)
    y_BD = sparse_triton.sparse_decode(idx_BK, val_BK, V_MD)
    close(y_BD, sparse.sparse_decode(idx_BK, val_BK, V_MD))
    sums_MD = sparse_triton.latent_sums(idx_BK, val_BK, x_BD, M)
    close(sums_MD, sparse.latent_sums(idx_BK, val_BK, x_BD, M))
    product_BK = sparse_triton.sparse_products(idx_BK, V_MD, x_BD)
    close(product_BK, sparse.row_products(idx_BK, V_MD, x_BD))


@pytest.mark.parametrize("D", [1, 300, 520])
def test_wide_targets_and_indices_past_the_rows(D: int) -> None:
    idx_BK, val_BK = code(3, 11, 21)
    V_7D = randn(7, D)
    around_BK = torch.where(idx_BK < 0, -1, idx_BK % 7)
    close(
        sparse_triton.sparse_decode(idx_BK, val_BK, V_7D),
        sparse.sparse_decode(around_BK, val_BK, V_7D),
    )
    x_BD = randn(3, D)
    close(
        sparse_triton.sparse_products(idx_BK, V_7D, x_BD),
        sparse_triton.sparse_products(around_BK, V_7D, x_BD),
    )


@pytest.mark.parametrize("piece", [1, 7, 16, 256])
def test_long_segments_are_summed_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_triton, "_PIECE", piece)
    idx_BK, val_BK = code(50, 3, 12)
    idx_BK[idx_BK % 3 == 0] = 4  # the most frequent latent
    val_BK[idx_BK < 0] = 0
    x_BD = randn(50, 9)
    sums_MD = sparse_triton.latent_sums(idx_BK, val_BK, x_BD, 13)
    close(sums_MD, sparse.latent_sums(idx_BK, val_BK, x_BD, 13))
    assert torch.equal(sums_MD, sparse_triton.latent_sums(idx_BK, val_BK, x_BD, 13))


def test_codes_without_entries() -> None:
    idx_BK = torch.full((4, 3), -1, device=DEVICE)
    val_BK, V_MD = torch.zeros(4, 3, device=DEVICE), randn(6, 5)
    assert (sparse_triton.sparse_decode(idx_BK, val_BK, V_MD) == 0).all()
    assert (sparse_triton.latent_sums(idx_BK, val_BK, randn(4, 5), 6) == 0).all()


@pytest.mark.parametrize("shared", [True, False])
def test_no_rows(shared: bool) -> None:
    x_0D, W_MD = randn(0, 5), randn(9, 5)
    U_MD = W_MD if shared else randn(9, 5)
    (idx_0K, val_0K), floor_0 = code(0, 3, 9), randn(0)
    assert best_atoms(x_0D, W_MD).shape == (0,)
    candidate_0S = best_candidates(x_0D, W_MD, 4)
    assert candidate_0S.shape == (0, 4)
    shortlist_steps_(x_0D, candidate_0S, W_MD, U_MD, idx_0K, val_0K, floor_0)
    dx_0D, dW_MD, _ = pursue_backward(idx_0K, val_0K, val_0K, x_0D, x_0D, W_MD, U_MD)
    assert dx_0D.shape == (0, 5)
    assert (dW_MD == 0).all()


# --- GPUs that this machine lacks


@pytest.mark.slow
def test_kernels_compile_for_every_generation(tmp_path: Path) -> None:
    """Without a GPU too. Consumer GPUs (86, 89, 120) have the least shared memory, 99 KiB."""
    limits = {"80": 163, "86": 99, "90": 227, "120": 99}
    program = PROJECT / "tests/helpers/compile_kernels.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, program, *limits], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for capability, shared in json.loads(done.stdout).items():
        assert shared <= limits[capability] * 1024
