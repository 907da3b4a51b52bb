"""TopK encoder (Gao et al. 2024, arXiv 2406.04093), and GroupMax: the largest of each group.

B rows in a batch, D input width, M latents, K active latents a row;
lower-case b: rows of one micro-batch.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.config.coder_settings import ScoreDtype
from mptrain.kernels.sparse import latent_sums, row_products, weighted_rows

_CPU_ELEMENTS = 1 << 21  # of one [b, M] matrix of pre-activations
_GPU_ELEMENTS = 1 << 28


def topk_encode(
    x_BD: Float[Tensor, "batch input"],
    b_D: Float[Tensor, " input"],
    encoder_MD: Float[Tensor, "latents input"],
    bias_M: Float[Tensor, " latents"],
    k: int,
    grouped: bool = False,
    score_dtype: ScoreDtype = "float32",
) -> tuple[Int64[Tensor, "batch {k}"], Float[Tensor, "batch {k}"]]:
    """The `k` largest of `relu((x - b) encoder^T + bias)` (sec. 2.3), in no promised order.

    With `grouped`, the largest of each of `k` groups of as many neighbouring latents instead.
    With bfloat16, the largest by products in it; their values are in float32 all the same.
    An entry that relu made 0 has index -1. Pre-activations are transient; the backward pass
    keeps indices, values and references to the arguments, and touches only chosen latents.
    """
    # torch does not annotate `apply`
    idx_BK, val_BK = _TopK.apply(  # type: ignore[no-untyped-call]
        x_BD, b_D, encoder_MD, bias_M, k, grouped, score_dtype
    )
    return idx_BK, val_BK


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        b_D: Tensor,
        encoder_MD: Tensor,
        bias_M: Tensor,
        k: int,
        grouped: bool,
        score_dtype: ScoreDtype,
    ) -> tuple[Tensor, Tensor]:
        idx_BK, val_BK = _largest(x_BD, b_D, encoder_MD, bias_M, k, grouped, score_dtype)
        ctx.save_for_backward(idx_BK, val_BK, x_BD, b_D, encoder_MD)
        ctx.mark_non_differentiable(idx_BK)
        return idx_BK, val_BK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, _didx: Tensor, dval_BK: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, None, None, None]:
        idx_BK, val_BK, x_BD, b_D, encoder_MD = ctx.saved_tensors
        dval_BK = dval_BK.masked_fill(val_BK <= 0, 0)
        dencoder_MD = latent_sums(idx_BK, dval_BK, x_BD - b_D, encoder_MD.shape[0])
        ones_B1 = dval_BK.new_ones(len(x_BD), 1)
        dbias_M = latent_sums(idx_BK, dval_BK, ones_B1, encoder_MD.shape[0])[:, 0]
        dx_BD = weighted_rows(idx_BK, dval_BK, encoder_MD) if ctx.needs_input_grad[0] else None
        # the sum over rows of -dL/dx, without making dL/dx
        db_D = -(dbias_M @ encoder_MD)
        return dx_BD, db_D, dencoder_MD, dbias_M, None, None, None


def _largest(
    x_BD: Tensor,
    b_D: Tensor,
    encoder_MD: Tensor,
    bias_M: Tensor,
    k: int,
    grouped: bool,
    score_dtype: ScoreDtype,
) -> tuple[Tensor, Tensor]:
    elements = _CPU_ELEMENTS if x_BD.device.type == "cpu" else _GPU_ELEMENTS
    rows = max(1, elements // encoder_MD.shape[0])
    choose = _group_maxima if grouped else _top
    is_exact = score_dtype == "float32"
    dtype = bias_M.dtype if is_exact else torch.bfloat16
    scoring_MD, scoring_M = encoder_MD.to(dtype), bias_M.to(dtype)
    parts = [
        choose(torch.addmm(scoring_M, (x_bD - b_D).to(dtype), scoring_MD.T), k)
        for x_bD in torch.split(x_BD, rows)
    ]
    idx_BK = torch.cat([idx_bK for _, idx_bK in parts])
    if is_exact:
        val_BK = torch.cat([val_bK for val_bK, _ in parts])
    else:
        val_BK = bias_M[idx_BK] + row_products(idx_BK, encoder_MD, x_BD - b_D)
    val_BK = val_BK.clamp_min_(0)
    return idx_BK.masked_fill_(val_BK <= 0, -1), val_BK


def _top(pre_bM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    largest = pre_bM.topk(k, sorted=False)
    return largest.values, largest.indices


def _group_maxima(pre_bM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = pre_bM.shape[1] // k
    largest = pre_bM.view(len(pre_bM), k, size).max(2)
    return largest.values, largest.indices + size * torch.arange(k, device=pre_bM.device)
