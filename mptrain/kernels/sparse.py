"""Products with sparse codes, without ever making them dense.

B rows in a batch, D input width, E target width, M latents, K code entries a row. A code is
(indices, values); index -1 with value 0 is an unused entry, an index may occur twice in a row.
A dictionary may be shorter than there are latents: `dictionary_row`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.kernels import triton_support


def sparse_decode(
    idx_BK: Int64[Tensor, "batch steps"],
    val_BK: Float[Tensor, "batch steps"],
    V_ME: Float[Tensor, "latents target"],
) -> Float[Tensor, "batch target"]:
    """`y_b = sum_k val_bk V[idx_bk]`, with gradients for values and decoder."""
    # torch does not annotate `apply`
    y_BE: Tensor = _SparseDecode.apply(idx_BK, val_BK, V_ME)  # type: ignore[no-untyped-call]
    return y_BE


def latent_sums(
    idx_BK: Int64[Tensor, "batch steps"],
    val_BK: Float[Tensor, "batch steps"],
    x_BD: Float[Tensor, "batch input"],
    latents: int,
) -> Float[Tensor, "{latents} input"]:
    """`sum_bk [idx_bk = m] val_bk x_b` for each row `m`: the transpose of `sparse_decode`.

    Sorts the entries by latent and sums each latent's rows: one order of summation on every device.
    """
    row_BK = idx_BK.clamp_min(0) % latents
    if _is_fused(x_BD):
        from mptrain.kernels import sparse_triton

        return sparse_triton.latent_sums(row_BK, val_BK, x_BD, latents)
    latent, order = row_BK.flatten().sort(stable=True)
    offset_M = torch.searchsorted(latent, torch.arange(latents, device=latent.device))
    row = order.div(idx_BK.shape[1], rounding_mode="floor")
    return F.embedding_bag(
        row, x_BD, offset_M, per_sample_weights=val_BK.flatten()[order], mode="sum"
    )


def entry_sums(
    idx_BK: Int64[Tensor, "batch steps"], x_BKD: Float[Tensor, "batch steps width"], latents: int
) -> Float[Tensor, "{latents} width"]:
    """The same of one vector for each entry, those of unused entries being zero."""
    entry_N1 = idx_BK.reshape(-1, 1)
    return latent_sums(
        entry_N1, torch.ones_like(entry_N1, dtype=x_BKD.dtype), x_BKD.flatten(0, 1), latents
    )


def dictionary_row(latent: Int64[Tensor, "*any"], dictionary_MD: Tensor) -> Int64[Tensor, "*any"]:
    """Which row of a dictionary belongs to each latent; some row for -1.

    A dictionary that all blocks of latents share is as long as one block; each block uses all rows.
    """
    return latent.clamp_min(0) % len(dictionary_MD)


def active_latents(
    idx_BK: Int64[Tensor, "batch steps"], val_BK: Float[Tensor, "batch steps"]
) -> Int64[Tensor, " batch"]:
    """Distinct latents with a non-zero value in each row; their mean is L0."""
    used_BK = idx_BK.masked_fill(val_BK == 0, -1).sort(dim=1).values
    first_BK = torch.ones_like(used_BK, dtype=torch.bool)
    first_BK[:, 1:] = used_BK[:, 1:] != used_BK[:, :-1]
    return (first_BK & (used_BK >= 0)).sum(1)


def strongest(val_BK: Tensor, mean: int) -> Tensor:
    """The least value that is kept where `mean` a row are on average; all are if fewer."""
    kept = min(mean * len(val_BK), val_BK.numel())
    if kept == 0:
        return val_BK.new_zeros(())
    return val_BK.flatten().topk(kept, sorted=False).values.min()


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, idx_BK: Tensor, val_BK: Tensor, V_ME: Tensor) -> Tensor:
        ctx.save_for_backward(idx_BK, val_BK, V_ME)
        if _is_fused(V_ME):
            from mptrain.kernels import sparse_triton

            return sparse_triton.sparse_decode(idx_BK, val_BK, V_ME)
        return weighted_rows(idx_BK, val_BK, V_ME)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BE: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        idx_BK, val_BK, V_ME = ctx.saved_tensors
        dy_BE, dval_BK, dV_ME = dy_BE.contiguous(), None, None
        if ctx.needs_input_grad[1]:
            dval_BK = row_products(idx_BK, V_ME, dy_BE)
        if ctx.needs_input_grad[2]:
            dV_ME = latent_sums(idx_BK, val_BK, dy_BE, V_ME.shape[0])
        return None, dval_BK, dV_ME


def weighted_rows(idx_BK: Tensor, val_BK: Tensor, V_ME: Tensor) -> Tensor:
    """The product of `sparse_decode`, differentiable by torch's own, slower rule."""
    return F.embedding_bag(
        dictionary_row(idx_BK, V_ME), V_ME, per_sample_weights=val_BK, mode="sum"
    )


def row_products(idx_BK: Tensor, V_ME: Tensor, x_BE: Tensor) -> Tensor:
    """`<V[idx_bk], x_b>`, 0 where unused. Torch's rule for the gradient of values alone does not
    gather `[B, K, E]` first.
    """
    if _is_fused(V_ME):
        from mptrain.kernels import sparse_triton

        return sparse_triton.sparse_products(idx_BK, V_ME, x_BE)
    with torch.enable_grad():
        val_BK = torch.zeros_like(idx_BK, dtype=V_ME.dtype).requires_grad_()
        y_BE = weighted_rows(idx_BK, val_BK, V_ME.detach())
    (product_BK,) = torch.autograd.grad(y_BE, val_BK, x_BE)
    return product_BK.masked_fill_(idx_BK < 0, 0)


def _is_fused(of_rows: Tensor) -> bool:
    """Whether there are Triton kernels for the device and dtype."""
    return of_rows.dtype == torch.float32 and triton_support.available(of_rows.device)
