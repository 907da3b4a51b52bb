"""Matching pursuit with gradients, by a backward pass that runs the pursuit in reverse.

B rows in a batch, D input width, M latents, K pursuit steps; lower-case b: rows of one micro-batch.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.pursuit.cut import Cut, cut_
from mptrain.pursuit.search import Search
from mptrain.pursuit.select import select

_ELEMENTS = 1 << 16  # of one [b, D] matrix going back; four of them stay in a CPU's L2 cache


def pursue(
    x_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "latents input"],
    k: int,
    tolerance: float,
    search: Search,
    detach: bool = False,
    cut: Cut | None = None,
) -> tuple[Int64[Tensor, "batch {k}"], Float[Tensor, "batch {k}"], Float[Tensor, "batch input"]]:
    """`select` with gradients: indices, values and last residual of `x`, an input minus its bias.

    Gradients flow through every coefficient and residual, with the choice of atoms held fixed;
    with `detach`, not from a step into those before it: what they took from `x` counts as given.
    With `cut`, rows end where it says.
    Kept for the backward pass: indices, values and the last residual (`B (12 K + 4 D)` bytes in
    float32) and a reference to `W`, instead of autograd's `K B D` or `K B M` numbers.
    """
    # torch does not annotate `apply`
    idx_BK, val_BK, residual_BD = _Pursuit.apply(  # type: ignore[no-untyped-call]
        x_BD, W_MD, k, tolerance, search, detach, cut
    )
    return idx_BK, val_BK, residual_BD


class _Pursuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_MD: Tensor,
        k: int,
        tolerance: float,
        search: Search,
        detach: bool,
        cut: Cut | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        idx_BK, val_BK, residual_BD = select(x_BD, W_MD, k, tolerance, search)
        if cut is not None:
            cut_(idx_BK, val_BK, residual_BD, W_MD, cut)
        ctx.save_for_backward(idx_BK, val_BK, residual_BD, W_MD)
        ctx.mark_non_differentiable(idx_BK)
        ctx.set_materialize_grads(False)
        ctx.detach = detach
        return idx_BK, val_BK, residual_BD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, _didx: None, dval_BK: Tensor | None, dresidual_BD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        idx_BK, val_BK, residual_BD, W_MD = ctx.saved_tensors
        dval_BK = torch.zeros_like(val_BK) if dval_BK is None else dval_BK
        g_BD = torch.zeros_like(residual_BD) if dresidual_BD is None else dresidual_BD.clone()
        dW_MD = torch.zeros_like(W_MD)
        dx_BD = g_BD.clone() if ctx.detach else g_BD
        rows = max(1, _ELEMENTS // W_MD.shape[1])
        parts = (torch.split(t, rows) for t in (idx_BK, val_BK, dval_BK, residual_BD, g_BD, dx_BD))
        for idx_bK, val_bK, dval_bK, residual_bD, g_bD, dx_bD in zip(*parts, strict=True):
            _reverse_rows_(dx_bD, dW_MD, W_MD, idx_bK, val_bK, dval_bK, residual_bD.clone(), g_bD)
        return dx_BD, dW_MD, None, None, None, None, None


def _reverse_rows_(
    dx_bD: Tensor,
    dW_MD: Tensor,
    W_MD: Tensor,
    idx_bK: Tensor,
    val_bK: Tensor,
    dval_bK: Tensor,
    r_bD: Tensor,
    g_bD: Tensor,
) -> None:
    """Walk the pursuit of one micro-batch from its last step to its first.

    In: `g = dx = dL/dr_K` and `r = r_K`. Out: `dx = dL/dr_0` and `r = r_0`; `dW` is added to. For a
    step with `r_{t+1} = r_t - a w` and `a = max(0, <w, r_t>)`, and `g = dL/dr_{t+1}`:

        s = [a > 0] (dL/da - <w, g>),  dL/dw += s r_t - a g,  dL/dr_t = g + s w

    `g` and `dx` are one tensor, or two where `g` is to stay as it is: then no step sees, through
    its residual, what later steps made of it. Deterministic on a CPU; on CUDA the order of
    `index_add_` is not, unless `torch.use_deterministic_algorithms(True)`.
    """
    for step in reversed(range(idx_bK.shape[1])):
        a_b, atom_b = val_bK[:, step, None], idx_bK[:, step].clamp_min(0)
        w_bD = W_MD.index_select(0, atom_b)
        r_bD.addcmul_(w_bD, a_b)
        s_b = dval_bK[:, step, None] - (w_bD * g_bD).sum(1, keepdim=True)
        s_b.masked_fill_(a_b <= 0, 0)
        dW_MD.index_add_(0, atom_b, (s_b * r_bD).addcmul_(a_b, g_bD, value=-1))
        dx_bD.addcmul_(w_bD, s_b)
