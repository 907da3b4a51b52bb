"""Pursuit steps by Triton kernels, one program a row: as `finders` and `forward` do in torch.

B rows in a batch, D input width, M latents, S candidates of a shortlist, R pursuit steps from one
shortlist to the next.

Import it where `kernels.triton_support.available` says so. `no_type_check` keeps the tests'
type-checking hook off the kernels, whose source Triton compiles.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.pursuit.triton_search import Precision, Sign, key_of, warps

_CANDIDATES = 128


def shortlist_steps_(
    r_BD: Float[Tensor, "batch input"],
    candidate_BS: Int64[Tensor, "batch candidates"],
    W_MD: Float[Tensor, "latents input"],
    U_MD: Float[Tensor, "latents input"],
    idx_BR: Int64[Tensor, "batch steps"],
    val_BR: Float[Tensor, "batch steps"],
    stop_norm_B: Float[Tensor, " batch"],
    sign: Sign = "positive",
    G_MM: Float[Tensor, "latents latents"] | None = None,
    precision: Precision = "tf32x3",
) -> None:
    """Pursuit steps among each row's candidates: fills `idx` and `val`, `r` is left over.

    A step chooses the candidate `j` with the best `p_j = <w_j, r>`, the lower number where two are
    equal, takes `a` from the residual itself, and `r <- r - a u_j` (`U` is `W`, or other vectors
    for its atoms). Where `||r|| <= stop_norm`, nothing is left to choose or `a = 0`, index is -1
    and value 0. A NaN in a row shows in its values.

    Scores of candidates are computed from `r` once, then `a <w, u_j>` is taken from them: these
    products are read from `G = U W^T` where it is given, else computed for each row's candidates
    (`B S^2` numbers are written). Candidates of a row differ. `idx` and `val` may be blocks of
    columns.
    """
    (B, S), D = candidate_BS.shape, r_BD.shape[1]
    candidate_BS, W_MD, U_MD, shared = candidate_BS.contiguous(), *_atoms(W_MD, U_MD)
    score_BS = r_BD.new_empty(B, S)
    products = r_BD.new_empty(B, S, S) if G_MM is None else G_MM.contiguous()
    block = max(16, min(_CANDIDATES, triton.next_power_of_2(S)))
    tiles = triton.cdiv(S, block)
    with torch.cuda.device(r_BD.get_device()):
        _candidate_kernel[(B, tiles, tiles if G_MM is None else 1)](
            *(r_BD, candidate_BS, W_MD, U_MD, score_BS, products, S, D, r_BD.stride(0)),
            SHARED=shared and tiles == 1,
            PRODUCTS=G_MM is None,
            PRECISION=precision,
            BLOCK_S=block,
            BLOCK_D=min(32, 2048 // block),
            num_warps=4 if block < _CANDIDATES else 8,
        )
    _steps_(
        *(r_BD, candidate_BS, score_BS, products, W_MD, U_MD, idx_BR, val_BR, stop_norm_B, sign),
        *(shared, G_MM is not None),
    )


def gram_steps_(
    r_BD: Float[Tensor, "batch input"],
    score_BM: Float[Tensor, "batch latents"],
    G_MM: Float[Tensor, "latents latents"],
    W_MD: Float[Tensor, "latents input"],
    U_MD: Float[Tensor, "latents input"],
    idx_BK: Int64[Tensor, "batch steps"],
    val_BK: Float[Tensor, "batch steps"],
    stop_norm_B: Float[Tensor, " batch"],
    sign: Sign = "positive",
) -> None:
    """`shortlist_steps_` with all atoms as candidates: exact up to rounding.

    `score = r W^T`, `G = U W^T`. A row's scores stay in registers from its first step to its last
    (past 32768 latents they spill); `score` is left as it was.
    """
    W_MD, U_MD, shared = _atoms(W_MD, U_MD)
    _steps_(
        *(r_BD, None, score_BM.contiguous(), G_MM.contiguous(), W_MD, U_MD, idx_BK, val_BK),
        *(stop_norm_B, sign, shared, True),
    )


def _steps_(
    r_BD: Tensor,
    candidate_BS: Tensor | None,
    score_BS: Tensor,
    products: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    idx_BR: Tensor,
    val_BR: Tensor,
    stop_norm_B: Tensor,
    sign: Sign,
    shared: bool,
    of_all: bool,
) -> None:
    (B, S), (M, D) = score_BS.shape, W_MD.shape
    assert r_BD.stride(1) == idx_BR.stride(1) == val_BR.stride(1) == 1, "kernels read rows"
    block_S, block_D = triton.next_power_of_2(S), triton.next_power_of_2(D)
    with torch.cuda.device(r_BD.get_device()):
        _steps_kernel[(B,)](
            *(r_BD, candidate_BS, score_BS, products, W_MD, U_MD, idx_BR, val_BR, stop_norm_B),
            *(S, D, idx_BR.shape[1], M if of_all else S, r_BD.stride(0)),
            *(idx_BR.stride(0), val_BR.stride(0)),
            MAGNITUDE=sign == "magnitude",
            POSITIVE=sign == "positive",
            SHARED=shared,
            ALL=candidate_BS is None,
            OF_ALL=of_all,
            BLOCK_S=block_S,
            BLOCK_D=block_D,
            num_warps=max(warps(block_S, each=1024), warps(block_D, each=256)),
        )


def _atoms(W_MD: Tensor, U_MD: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both in one piece, and whether they are one tensor."""
    shared = W_MD is U_MD
    W_MD = W_MD.contiguous()
    return W_MD, W_MD if shared else U_MD.contiguous(), shared


@triton.jit
@no_type_check
def _candidate_kernel(
    r,
    candidate,
    W,
    U,
    score,
    product,
    S,
    D,
    r_stride,
    SHARED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row's scores, and a tile of `product[j, i] = <u_j, w_i>` of its candidates."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    j = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    w_row = W + tl.load(candidate + row * S + i, mask=i < S, other=0)[:, None] * D
    u_row = U + tl.load(candidate + row * S + j, mask=j < S, other=0)[:, None] * D
    sums = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    tile = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        w = tl.load(w_row + d[None, :], mask=(d < D)[None, :], other=0.0)
        sums += w * tl.load(r + row * r_stride + d, mask=d < D, other=0.0)[None, :]
        if PRODUCTS:
            u = w
            if not SHARED:
                u = tl.load(u_row + d[None, :], mask=(d < D)[None, :], other=0.0)
            tile = tl.dot(u, tl.trans(w), tile, input_precision=PRECISION)
    if tl.program_id(2) == 0:
        tl.store(score + row * S + i, tl.sum(sums, 1), mask=i < S)
    if PRODUCTS:
        at = (row * S + j)[:, None] * S + i[None, :]
        tl.store(product + at, tile, mask=(j < S)[:, None] & (i < S)[None, :])


@triton.jit
@no_type_check
def _steps_kernel(
    r,
    candidate,
    score,
    product,
    W,
    U,
    idx,
    val,
    stop_norm,
    S,
    D,
    R,
    width,
    r_stride,
    idx_stride,
    val_stride,
    MAGNITUDE: tl.constexpr,
    POSITIVE: tl.constexpr,
    SHARED: tl.constexpr,
    ALL: tl.constexpr,
    OF_ALL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All steps of one row in one kernel, so that its residual and scores stay in registers."""
    row = tl.program_id(0).to(tl.int64)
    position, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    within_S, within_D = position < S, d < D
    atom = position
    if not ALL:
        atom = tl.load(candidate + row * S + position, mask=within_S, other=0).to(tl.int32)
    p = tl.load(score + row * S + position, mask=within_S, other=float("-inf"))
    rest = tl.load(r + row * r_stride + d, mask=within_D, other=0.0)
    least = tl.load(stop_norm + row)
    for step in range(R):
        key = key_of(p, MAGNITUDE)
        best = tl.max(key, 0)
        j = tl.min(tl.where((key == best) & within_S, atom, 2147483647), 0).to(tl.int64)
        w = tl.load(W + j * D + d, mask=within_D, other=0.0)
        u = w
        if not SHARED:
            u = tl.load(U + j * D + d, mask=within_D, other=0.0)
        a = tl.sum(w * rest, 0)
        stops = (best == float("-inf")) | (tl.sqrt(tl.sum(rest * rest, 0)) <= least)
        if POSITIVE:
            stops = stops | (a <= 0)
        a = tl.where(stops, 0.0, a)
        tl.store(idx + row * idx_stride + step, tl.where(a == 0, -1, j))
        tl.store(val + row * val_stride + step, a)
        rest -= a * u
        if OF_ALL:
            at = j * width + atom
        else:
            at = (
                row * S + tl.max(tl.where((atom == j) & within_S, position, 0), 0)
            ) * width + position
        p -= a * tl.load(product + at, mask=within_S, other=0.0)
    tl.store(r + row * r_stride + d, rest, mask=within_D)
