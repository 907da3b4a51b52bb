"""Products with sparse codes and the TopK encoder, against dense ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mptrain.coders import topk_code as topk_module
from mptrain.coders.topk_code import topk_encode
from mptrain.kernels import prefix_errors as prefix_module
from mptrain.kernels.prefix_errors import prefix_squares
from mptrain.kernels.sparse import (
    active_latents,
    dictionary_row,
    latent_sums,
    sparse_decode,
    strongest,
)
from tests.helpers import reference


def code(seed: int, B: int, K: int, M: int) -> tuple[Tensor, Tensor]:
    """Random code with repeated latents and unused entries."""
    generator = torch.Generator().manual_seed(seed)
    idx_BK = torch.randint(-1, M, (B, K), generator=generator)
    val_BK = torch.rand(B, K, generator=generator, dtype=torch.float64)
    return idx_BK, val_BK.masked_fill(idx_BK < 0, 0)


def dense_rows(idx_BK: Tensor, val_BK: Tensor, rows: int) -> Tensor:
    """The dense code over the rows of a dictionary that blocks of latents share."""
    return reference.dense(torch.where(idx_BK < 0, -1, idx_BK % rows), val_BK, rows)


few = st.integers(1, 6)
each_sharing = pytest.mark.parametrize("blocks", [1, 3])  # of latents that share the dictionary


@each_sharing
@given(seed=st.integers(0, 2**20), B=few, K=few, M=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_decode_and_its_gradients_equal_dense(blocks: int, seed: int, B: int, K: int, M: int):
    idx_BK, val_BK = code(seed, B, K, blocks * M)
    V_ME = torch.randn(M, 3, dtype=torch.float64, requires_grad=True)
    weight_BE = torch.randn(B, 3, dtype=torch.float64)
    val_BK.requires_grad_()
    y_BE = sparse_decode(idx_BK, val_BK, V_ME)
    ours = torch.autograd.grad((y_BE * weight_BE).sum(), (val_BK, V_ME))
    dense_BE = dense_rows(idx_BK, val_BK, M) @ V_ME
    plain = torch.autograd.grad((dense_BE * weight_BE).sum(), (val_BK, V_ME))
    torch.testing.assert_close(y_BE, dense_BE)
    torch.testing.assert_close(ours[0], plain[0].masked_fill(idx_BK < 0, 0))
    torch.testing.assert_close(ours[1], plain[1])
    sums_ME = latent_sums(idx_BK, val_BK.detach(), weight_BE, M)
    torch.testing.assert_close(sums_ME, plain[1])


def test_decode_takes_an_expanded_gradient():
    idx_BK, val_BK = code(0, 4, 3, 5)
    V_ME = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    sparse_decode(idx_BK, val_BK, V_ME).sum().backward()
    assert V_ME.grad is not None
    torch.testing.assert_close(V_ME.grad[:, 0], reference.dense(idx_BK, val_BK, 5).sum(0))


def test_each_block_uses_all_rows_of_a_shared_dictionary():
    W_MD = torch.zeros(3, 2)
    assert dictionary_row(torch.tensor([0, 1, 2, 3, 4, 5, 8]), W_MD).tolist() == [
        0,
        1,
        2,
        0,
        1,
        2,
        2,
    ]
    assert 0 <= int(dictionary_row(torch.tensor(-1), W_MD)) < 3, "some row, so that it can be taken"


@given(st.integers(0, 2**20), st.integers(0, 6), few, st.integers(1, 7))
def test_strongest_keeps_the_given_mean_number(seed: int, B: int, K: int, mean: int):
    generator = torch.Generator().manual_seed(seed)
    val_BK = torch.randint(9, (B, K), generator=generator).double()
    threshold = strongest(val_BK, mean)
    if B == 0:
        assert threshold == 0, "of no rows all is kept"
        return
    kept = min(mean * B, B * K)
    assert threshold == sorted(val_BK.flatten().tolist())[-kept]
    assert (val_BK > threshold).sum() < kept <= (val_BK >= threshold).sum()


def test_active_latents_are_distinct_and_not_zero():
    idx_BK = torch.tensor([[3, 3, 1, -1], [-1, -1, -1, -1], [0, 1, 2, 3], [2, 0, 2, 0]])
    val_BK = torch.tensor([[1.0, 2, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    assert active_latents(idx_BK, val_BK).tolist() == [2, 0, 4, 1]


def encoder(seed: int, B: int, D: int, M: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, D), (D,), (M, D), (M,))
    x, b, W, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, b, W, bias


@given(st.integers(0, 2**20), st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.data())
@settings(max_examples=100, deadline=None)
def test_topk_equals_reference(seed: int, B: int, D: int, M: int, data: st.DataObject):
    k = data.draw(st.integers(1, M))
    arguments = encoder(seed, B, D, M)
    idx_BK, val_BK = topk_encode(*arguments, k)
    assert ((idx_BK >= 0) == (val_BK > 0)).all()
    ours = reference.dense(idx_BK, val_BK, M)
    np.testing.assert_allclose(ours, reference.topk(*(t.numpy() for t in arguments), k), atol=1e-12)


def test_topk_gradcheck():
    arguments = tuple(t.requires_grad_() for t in encoder(1, 4, 3, 7))
    assert torch.autograd.gradcheck(lambda *a: topk_encode(*a, 4)[1], arguments)


def test_topk_microbatch_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    arguments = encoder(2, 11, 3, 7)
    expected = topk_encode(*arguments, 3)
    monkeypatch.setattr(topk_module, "_CPU_ELEMENTS", 3 * 7)
    for a, b in zip(expected, topk_encode(*arguments, 3), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_topk_keeps_no_preactivations():
    B, D, M = 64, 16, 1024
    arguments = tuple(t.float().requires_grad_() for t in encoder(0, B, D, M))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        topk_encode(*arguments, 8)
    assert all(t.numel() < B * M for t in kept)


@each_sharing
@given(seed=st.integers(0, 2**20), B=few, K=few, M=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_prefix_squares_and_their_gradients_equal_autograd(
    blocks: int, seed: int, B: int, K: int, M: int
):
    idx_BK, val_BK = code(seed, B, K, blocks * M)
    generator = torch.Generator().manual_seed(seed)
    error_BE = torch.randn(B, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    V_ME = torch.randn(M, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    val_BK.requires_grad_()
    plain_B = torch.zeros(B, dtype=torch.float64)
    for t in range(1, K + 1):
        y_BE = dense_rows(idx_BK[:, :t], val_BK[:, :t], M) @ V_ME
        plain_B = plain_B + (error_BE - y_BE).square().sum(1)
    ours_B = prefix_squares(idx_BK, val_BK, V_ME, error_BE)
    torch.testing.assert_close(ours_B, plain_B)
    ours, plain = (
        torch.autograd.grad(squares.square().sum(), (val_BK, V_ME, error_BE))
        for squares in (ours_B, plain_B)
    )
    torch.testing.assert_close(ours[0], plain[0].masked_fill(idx_BK < 0, 0))
    torch.testing.assert_close(ours[1:], plain[1:])


def test_prefix_microbatch_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    idx_BK, val_BK = code(0, 11, 3, 7)
    V_ME, error_BE = torch.randn(7, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in (val_BK, V_ME, error_BE))

    def result() -> tuple[Tensor, ...]:
        squares_B = prefix_squares(idx_BK, *leaves)
        return squares_B, *torch.autograd.grad(squares_B.square().sum(), leaves)

    expected = result()
    monkeypatch.setattr(prefix_module, "_ELEMENTS", 3 * 4)
    for a, b in zip(result(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_prefix_squares_of_no_rows_and_of_one_with_a_nan():
    idx_BK, val_BK = code(0, 4, 3, 7)
    V_ME, error_BE = torch.randn(7, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    assert prefix_squares(idx_BK[:0], val_BK[:0], V_ME, error_BE[:0]).shape == (0,)
    clean_B = prefix_squares(idx_BK, val_BK, V_ME, error_BE)
    error_BE[2, 0] = torch.nan
    spoilt_B = prefix_squares(idx_BK, val_BK, V_ME, error_BE)
    assert spoilt_B.isnan().tolist() == [False, False, True, False]
    assert torch.equal(spoilt_B[[0, 1, 3]], clean_B[[0, 1, 3]])
