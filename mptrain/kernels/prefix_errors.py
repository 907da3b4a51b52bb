"""Errors of every prefix of a code, without keeping any of them.

B rows in a batch, E target width, M latents, K code entries a row; lower-case b: rows of one
micro-batch.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.kernels.sparse import dictionary_row, entry_sums

_ELEMENTS = 1 << 16  # of one [b, E] matrix; four of them stay in a CPU's L2 cache


def prefix_squares(
    idx_BK: Int64[Tensor, "batch steps"],
    val_BK: Float[Tensor, "batch steps"],
    V_ME: Float[Tensor, "latents target"],
    error_BE: Float[Tensor, "batch target"],
) -> Float[Tensor, " batch"]:
    """`sum_t ||error - sum_{s <= t} val_s V[idx_s]||^2` over the prefixes `t = 1 .. K` of a code.

    With gradients for values, decoder and error; kept for them: the code and the last error.
    """
    # torch does not annotate `apply`
    squares_B: Tensor = _PrefixSquares.apply(  # type: ignore[no-untyped-call]
        idx_BK, val_BK, V_ME, error_BE
    )
    return squares_B


class _PrefixSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, idx_BK: Tensor, val_BK: Tensor, V_ME: Tensor, error_BE: Tensor) -> Tensor:
        error_BE = error_BE.clone()
        squares_B = error_BE.new_zeros(len(error_BE))
        for idx_bK, val_bK, e_bE, squares_b in _microbatches(idx_BK, val_BK, error_BE, squares_B):
            for step in range(idx_bK.shape[1]):
                v_bE = V_ME.index_select(0, dictionary_row(idx_bK[:, step], V_ME))
                e_bE.addcmul_(v_bE, val_bK[:, step, None], value=-1)
                squares_b += e_bE.square().sum(1)
        ctx.save_for_backward(idx_BK, val_BK, V_ME, error_BE)
        return squares_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dsquares_B: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        idx_BK, val_BK, V_ME, error_BE = ctx.saved_tensors
        dval_BK, dV_ME = torch.zeros_like(val_BK), torch.zeros_like(V_ME)
        derror_BE = torch.zeros_like(error_BE)
        for d_b, idx_bK, val_bK, e_bE, dval_bK, derror_bE in _microbatches(
            2 * dsquares_B, idx_BK, val_BK, error_BE, dval_BK, derror_BE
        ):
            dV_ME += _reverse_rows_(
                derror_bE, dval_bK, V_ME, idx_bK, val_bK, e_bE.clone(), d_b[:, None]
            )
        return None, dval_BK, dV_ME, derror_BE


def _reverse_rows_(
    h_bE: Tensor,
    dval_bK: Tensor,
    V_ME: Tensor,
    idx_bK: Tensor,
    val_bK: Tensor,
    e_bE: Tensor,
    d_b1: Tensor,
) -> Tensor:
    """From the last prefix to the first, `h` collects `d e_t`; a step is in all errors after it.

    Gives the decoder's gradient.
    """
    terms_KbE = h_bE.new_empty(idx_bK.shape[1], *h_bE.shape)
    for step in reversed(range(idx_bK.shape[1])):
        a_b1 = val_bK[:, step, None]
        v_bE = V_ME.index_select(0, dictionary_row(idx_bK[:, step], V_ME))
        h_bE.addcmul_(e_bE, d_b1)
        dval_bK[:, step] = -(v_bE * h_bE).sum(1).masked_fill(idx_bK[:, step] < 0, 0)
        torch.mul(-a_b1, h_bE, out=terms_KbE[step])
        e_bE.addcmul_(v_bE, a_b1)
    return entry_sums(idx_bK.T, terms_KbE, len(V_ME))


def _microbatches(*of_batch: Tensor) -> "zip[tuple[Tensor, ...]]":
    width = max(t.shape[1] for t in of_batch if t.ndim == 2)
    rows = max(1, _ELEMENTS // width)
    return zip(*(torch.split(t, rows) for t in of_batch), strict=True)
