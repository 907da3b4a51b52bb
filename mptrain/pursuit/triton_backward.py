"""The backward pass of a pursuit by Triton kernels: what `backward` does in torch.

B rows in a batch, D input width, M latents, K pursuit steps, C columns of the input width at once.

Import it where `kernels.triton_support.available` says so. `no_type_check` keeps the tests'
type-checking hook off the kernels, whose source Triton compiles.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.kernels.sparse_triton import Segments, segments, sum_segments
from mptrain.pursuit.triton_search import warps

_SCRATCH = 1 << 30  # bytes of what the steps give to the atoms' gradients, for some columns


def pursue_backward(
    idx_BK: Int64[Tensor, "batch steps"],
    val_BK: Float[Tensor, "batch steps"],
    dval_BK: Float[Tensor, "batch steps"],
    residual_BD: Float[Tensor, "batch input"],
    dresidual_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "latents input"],
    U_MD: Float[Tensor, "latents input"],
    detach: bool = False,
    scratch: int = _SCRATCH,
) -> tuple[
    Float[Tensor, "batch input"],
    Float[Tensor, "latents input"],
    Float[Tensor, "latents input"] | None,
]:
    """Gradients `dx`, `dW` and `dU`, from those of values and last residual.

    For steps with `a = <w, r_t>` and `r_{t+1} = r_t - a u`, from the last to the first, with
    `g = dL/dr_{t+1}`, and with `s = 0` in unused steps (index -1):

        s = dL/da - <u, g>,  dL/dw += s r_t,  dL/du -= a g,  dL/dr_t = g + s w

    If `U` is `W`, the very tensor, `dW` has both parts and `dU` is None. With `detach`, `g` stays
    the gradient of the last residual: no step sees what later steps made of it.

    First each row finds its `s` and `dx`. Then residuals and gradients are gone through once more,
    for as many columns at once as fit `scratch` bytes, and summed by latent. Columns do not meet in
    any sum, nor do atomics take part: the result is the same bits each time, whatever `scratch`.
    """
    idx_BK, val_BK, dval_BK, residual_BD, dresidual_BD = (
        t.contiguous() for t in (idx_BK, val_BK, dval_BK, residual_BD, dresidual_BD)
    )
    shared = U_MD is W_MD
    W_MD = W_MD.contiguous()
    U_MD = W_MD if shared else U_MD.contiguous()
    dx_BD, s_BK = _slopes(idx_BK, dval_BK, dresidual_BD, W_MD, U_MD, detach)
    dW_MD = torch.empty_like(W_MD)
    dU_MD = None if shared else torch.empty_like(U_MD)
    by_latent = segments(idx_BK, len(W_MD))
    for first, columns in _column_blocks(idx_BK.numel(), W_MD.shape[1], scratch, shared):
        _dictionary_gradients_(
            *(dW_MD, dU_MD, by_latent, idx_BK, val_BK, s_BK, residual_BD, dresidual_BD),
            *(W_MD, U_MD, detach, first, columns),
        )
    return dx_BD, dW_MD, dU_MD


def _column_blocks(entries: int, D: int, scratch: int, shared: bool) -> list[tuple[int, int]]:
    """First column and number of columns of each block, in multiples of 32."""
    columns = scratch // (max(entries, 1) * 4 * (1 if shared else 2)) // 32 * 32
    columns = max(32, min(D, columns))
    return [(first, min(columns, D - first)) for first in range(0, D, columns)]


def _slopes(
    idx_BK: Tensor, dval_BK: Tensor, g_BD: Tensor, W_MD: Tensor, U_MD: Tensor, detach: bool
) -> tuple[Tensor, Tensor]:
    """`dx` and every step's `s`."""
    (B, K), D = idx_BK.shape, W_MD.shape[1]
    dx_BD, s_BK = torch.empty_like(g_BD), torch.empty_like(dval_BK)
    block = triton.next_power_of_2(D)
    with torch.cuda.device(g_BD.get_device()):
        _slope_kernel[(B,)](
            *(idx_BK, dval_BK, g_BD, W_MD, U_MD, dx_BD, s_BK, K, D),
            SHARED=U_MD is W_MD,
            DETACH=detach,
            BLOCK_D=block,
            num_warps=warps(block, each=256),
        )
    return dx_BD, s_BK


def _dictionary_gradients_(
    dW_MD: Tensor,
    dU_MD: Tensor | None,
    by_latent: Segments,
    idx_BK: Tensor,
    val_BK: Tensor,
    s_BK: Tensor,
    residual_BD: Tensor,
    g_BD: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    detach: bool,
    first: int,
    columns: int,
) -> None:
    """Fill a block of columns."""
    (B, K), D = idx_BK.shape, W_MD.shape[1]
    dw_NC = g_BD.new_empty(B * K, columns)
    du_NC = None if dU_MD is None else torch.empty_like(dw_NC)
    block = min(256, triton.next_power_of_2(columns))
    with torch.cuda.device(g_BD.get_device()):
        _contribution_kernel[(triton.cdiv(B, 4), triton.cdiv(columns, block))](
            *(idx_BK, val_BK, s_BK, residual_BD, g_BD, W_MD, U_MD, dw_NC, du_NC),
            *(B, K, D, first, columns),
            SHARED=dU_MD is None,
            DETACH=detach,
            BLOCK_B=4,
            BLOCK_C=block,
            num_warps=4,
        )
    sum_segments(by_latent, None, dw_NC, 1, dW_MD[:, first : first + columns])
    if dU_MD is not None and du_NC is not None:
        sum_segments(by_latent, None, du_NC, 1, dU_MD[:, first : first + columns])


@triton.jit
@no_type_check
def _slope_kernel(
    idx,
    dval,
    g,
    W,
    U,
    dx,
    s,
    K,
    D,
    SHARED: tl.constexpr,
    DETACH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    within = d < D
    g_D = tl.load(g + row * D + d, mask=within, other=0.0)
    dx_D = g_D
    for back in range(K):
        at = row * K + K - 1 - back
        latent = tl.load(idx + at)
        used = d < tl.where(latent >= 0, D, 0)
        u_D = tl.load(U + latent * D + d, mask=used, other=0.0)
        w_D = u_D
        if not SHARED:
            w_D = tl.load(W + latent * D + d, mask=used, other=0.0)
        slope = tl.where(latent >= 0, tl.load(dval + at) - tl.sum(u_D * g_D, 0), 0.0)
        tl.store(s + at, slope)
        dx_D += slope * w_D
        if not DETACH:
            g_D = dx_D
    tl.store(dx + row * D + d, dx_D, mask=within)


@triton.jit
@no_type_check
def _contribution_kernel(
    idx,
    val,
    s,
    residual,
    g,
    W,
    U,
    dw,
    du,
    B,
    K,
    D,
    first,
    columns,
    SHARED: tl.constexpr,
    DETACH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Entry `(b, t)` gets `s r_t` and `-a g`; both in one where `W` and `U` are."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = (row < B)[:, None] & (col < columns)[None, :]
    at = row[:, None] * D + first + col[None, :]
    r_BC = tl.load(residual + at, mask=within, other=0.0)
    g_BC = tl.load(g + at, mask=within, other=0.0)
    for back in range(K):
        entry = row * K + K - 1 - back
        latent = tl.load(idx + entry, mask=row < B, other=-1)
        a = tl.load(val + entry, mask=row < B, other=0.0)[:, None]
        slope = tl.load(s + entry, mask=row < B, other=0.0)[:, None]
        used = within & (latent >= 0)[:, None]
        atom = latent[:, None] * D + first + col[None, :]
        u_BC = tl.load(U + atom, mask=used, other=0.0)
        w_BC = u_BC
        if not SHARED:
            w_BC = tl.load(W + atom, mask=used, other=0.0)
        r_BC += a * u_BC
        out = entry[:, None] * columns + col[None, :]
        if SHARED:
            tl.store(dw + out, slope * r_BC - a * g_BC, mask=used)
        else:
            tl.store(dw + out, slope * r_BC, mask=used)
            tl.store(du + out, -a * g_BC, mask=used)
        if not DETACH:
            g_BC += slope * w_BC
