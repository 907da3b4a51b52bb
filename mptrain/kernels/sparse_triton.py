"""Products with sparse codes as Triton kernels: those of `kernels.sparse`, for float32 on a GPU.

B rows in a batch, D input width, E target width, M latents, K code entries a row, N entries to be
summed by latent, X further pieces of long segments. No sum depends on timing: there are no atomics.
Import it where `kernels.triton_support.available` says so. `no_type_check` keeps the tests'
type-checking hook off the kernels, whose source Triton compiles.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

_PIECE = 256  # entries that one program sums; a latent that every row uses must not take for ever


def sparse_decode(
    idx_BK: Int64[Tensor, "batch steps"],
    val_BK: Float[Tensor, "batch steps"],
    V_ME: Float[Tensor, "rows target"],
) -> Float[Tensor, "batch target"]:
    """`y_b = sum_k val_bk V[idx_bk % rows(V)]`, without gradients; index -1 is an unused entry."""
    (B, K), (rows, E) = idx_BK.shape, V_ME.shape
    y_BE = val_BK.new_empty(B, E)
    block = min(512, triton.next_power_of_2(E))
    with torch.cuda.device(y_BE.get_device()):
        _decode_kernel[(B, triton.cdiv(E, block))](
            *(idx_BK.contiguous(), val_BK.contiguous(), V_ME.contiguous(), y_BE, K, rows, E),
            BLOCK_K=8,
            BLOCK_E=block,
        )
    return y_BE


def sparse_products(
    idx_BK: Int64[Tensor, "batch steps"],
    V_ME: Float[Tensor, "rows target"],
    y_BE: Float[Tensor, "batch target"],
) -> Float[Tensor, "batch steps"]:
    """`<V[idx_bk % rows(V)], y_b>`, 0 for an unused entry: values' gradient of `sparse_decode`."""
    (B, K), (rows, E) = idx_BK.shape, V_ME.shape
    product_BK = y_BE.new_empty(B, K)
    block = min(256, triton.next_power_of_2(E))
    with torch.cuda.device(y_BE.get_device()):
        _products_kernel[(B, triton.cdiv(K, 16))](
            *(idx_BK.contiguous(), V_ME.contiguous(), y_BE.contiguous(), product_BK, K, rows, E),
            BLOCK_K=16,
            BLOCK_E=block,
        )
    return product_BK


def latent_sums(
    idx_BK: Int64[Tensor, "batch steps"],
    val_BK: Float[Tensor, "batch steps"],
    x_BD: Float[Tensor, "batch input"],
    latents: int,
) -> Float[Tensor, "{latents} input"]:
    """`sum_bk [idx_bk = m] val_bk x_b` for each latent `m`; index -1 is an unused entry."""
    sums_MD = x_BD.new_empty(latents, x_BD.shape[1])
    sum_segments(
        segments(idx_BK, latents), val_BK.flatten(), x_BD.contiguous(), idx_BK.shape[1], sums_MD
    )
    return sums_MD


class Segments(NamedTuple):
    """Entries sorted by latent, cut into pieces of at most `_PIECE`."""

    order_N: Tensor
    "places of the entries, those of one latent one after the other"
    first_M: Tensor
    last_M: Tensor
    "each latent's first piece is `order[first:last]`"
    first_X: Tensor
    last_X: Tensor
    "further pieces, in the order of their latents; past the last one they are empty"
    extra_first_M: Tensor
    extra_last_M: Tensor
    "which of the further pieces are a latent's"


def segments(idx_BK: Tensor, latents: int) -> Segments:
    """Sorts a code's entries; waits for no result, so that a GPU's queue does not run dry."""
    device = idx_BK.device
    latent_N, order_N = idx_BK.flatten().int().sort(stable=True)
    bounds = torch.arange(latents + 1, device=device, dtype=torch.int32)
    offset = torch.searchsorted(latent_N, bounds)
    first_M, end_M = offset[:-1], offset[1:]
    last_M = torch.minimum(first_M + _PIECE, end_M)
    extra_last_M = (end_M - last_M).add(_PIECE - 1).div(_PIECE, rounding_mode="floor").cumsum(0)
    extra_first_M = torch.cat([extra_last_M.new_zeros(1), extra_last_M[:-1]])
    extra_X = torch.arange(len(order_N) // _PIECE, device=device)
    latent_X = torch.searchsorted(extra_last_M, extra_X, right=True).clamp_max_(latents - 1)
    first_X = first_M[latent_X] + (extra_X - extra_first_M[latent_X] + 1) * _PIECE
    last_X = torch.minimum(first_X + _PIECE, end_M[latent_X])
    return Segments(order_N, first_M, last_M, first_X, last_X, extra_first_M, extra_last_M)


def sum_segments(
    by_latent: Segments, weight_N: Tensor | None, x_ND: Tensor, divisor: int, sums_MD: Tensor
) -> None:
    """`sums_m <- sum weight_n x[n // divisor]` over the entries `n` of each latent `m`.

    `sums` may be a block of columns of a larger matrix.
    """
    further_XD = x_ND.new_empty(len(by_latent.first_X), x_ND.shape[1])
    order_N = by_latent.order_N
    _sum(sums_MD, by_latent.first_M, by_latent.last_M, order_N, weight_N, x_ND, divisor)
    if len(further_XD):
        _sum(further_XD, by_latent.first_X, by_latent.last_X, order_N, weight_N, x_ND, divisor)
        first_M, last_M = by_latent.extra_first_M, by_latent.extra_last_M
        _sum(sums_MD, first_M, last_M, None, None, further_XD, 1, add=True)


def _sum(
    out_SD: Tensor,
    first_S: Tensor,
    last_S: Tensor,
    order_N: Tensor | None,
    weight_N: Tensor | None,
    x_ND: Tensor,
    divisor: int,
    add: bool = False,
) -> None:
    D = x_ND.shape[1]
    block = min(256, triton.next_power_of_2(D))
    with torch.cuda.device(x_ND.get_device()):
        _sum_kernel[(len(first_S), triton.cdiv(D, block))](
            *(out_SD, first_S, last_S, order_N, weight_N, x_ND, D, x_ND.stride(0)),
            *(out_SD.stride(0), divisor),
            BLOCK_N=8,
            BLOCK_D=block,
            ORDERED=order_N is not None,
            WEIGHTED=weight_N is not None,
            ADD=add,
        )


@triton.jit
@no_type_check
def _decode_kernel(idx, val, V, y, K, rows, E, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    sums = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        latent = tl.load(idx + row * K + k, mask=k < K, other=-1)
        a = tl.load(val + row * K + k, mask=k < K, other=0.0)
        within = (latent >= 0)[:, None] & (col < E)[None, :]
        at = (latent % rows)[:, None] * E + col[None, :]
        sums += a[:, None] * tl.load(V + at, mask=within, other=0.0).to(tl.float32)
    tl.store(y + row * E + col, tl.sum(sums, 0), mask=col < E)


@triton.jit
@no_type_check
def _products_kernel(idx, V, y, product, K, rows, E, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    latent = tl.load(idx + row * K + k, mask=k < K, other=-1)
    sums = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for first in range(0, E, BLOCK_E):
        col = first + tl.arange(0, BLOCK_E)
        within = (latent >= 0)[:, None] & (col < E)[None, :]
        at = (latent % rows)[:, None] * E + col[None, :]
        v = tl.load(V + at, mask=within, other=0.0).to(tl.float32)
        sums += v * tl.load(y + row * E + col, mask=col < E, other=0.0)[None, :]
    tl.store(product + row * K + k, tl.where(latent >= 0, tl.sum(sums, 1), 0.0), mask=k < K)


@triton.jit
@no_type_check
def _sum_kernel(
    out,
    first,
    last,
    order,
    weight,
    x,
    D,
    x_stride,
    out_stride,
    divisor,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ORDERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.load(first + segment), tl.load(last + segment)
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        entry = n
        if ORDERED:
            entry = tl.load(order + n, mask=n < end, other=0)
        within = (n < end)[:, None] & (col < D)[None, :]
        at = (entry // divisor).to(tl.int64)[:, None] * x_stride + col[None, :]
        tile = tl.load(x + at, mask=within, other=0.0)
        if WEIGHTED:
            tile *= tl.load(weight + entry, mask=n < end, other=0.0)[:, None]
        sums += tile
    sum_D = tl.sum(sums, 0)
    within = col < D
    if ADD:
        within = col < tl.where(start < end, D, 0)
        sum_D += tl.load(out + segment * out_stride + col, mask=within, other=0.0)
    tl.store(out + segment * out_stride + col, sum_D, mask=within)
