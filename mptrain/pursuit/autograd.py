"""Matching pursuit with gradients, by a backward pass that runs the pursuit in reverse.

B rows in a batch, D input width, M latents, K pursuit steps.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.pursuit.backend import AtomSearch
from mptrain.pursuit.backward import pursue_backward
from mptrain.pursuit.batch_threshold import EntryThreshold, drop_weak_steps_
from mptrain.pursuit.forward import pursue_forward
from mptrain.pursuit.rule import Rule


def matching_pursuit(
    x_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "selecting input"],
    U_MD: Float[Tensor, "subtracting input"],
    k: int,
    rule: Rule,
    search: AtomSearch,
    detach: bool = False,
    threshold: EntryThreshold | None = None,
) -> tuple[Int64[Tensor, "batch {k}"], Float[Tensor, "batch {k}"], Float[Tensor, "batch input"]]:
    """Matching pursuit of `x`, an input minus its bias, with gradients.

    Returns indices, values and the last residual: those of `pursue_forward`.
    Gradients flow through every coefficient and residual, with the choice of atoms held fixed;
    with `detach`, not from a step into those before it: what they took from `x` counts as given.
    With `threshold`, rows end before their first weak step.
    Kept for the backward pass: indices, values and the last residual (`B (12 K + 4 D)` bytes in
    float32) and references to the dictionaries, instead of autograd's `K B D` or `K B M` numbers.
    """
    # torch does not annotate `apply`
    idx_BK, val_BK, residual_BD = _Pursuit.apply(  # type: ignore[no-untyped-call]
        x_BD, W_MD, None if U_MD is W_MD else U_MD, k, rule, search, detach, threshold
    )
    return idx_BK, val_BK, residual_BD


class _Pursuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_MD: Tensor,
        other_MD: Tensor | None,
        k: int,
        rule: Rule,
        search: AtomSearch,
        detach: bool,
        threshold: EntryThreshold | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        U_MD = W_MD if other_MD is None else other_MD
        idx_BK, val_BK, residual_BD = pursue_forward(x_BD, W_MD, U_MD, k, rule, search)
        if threshold is not None:
            drop_weak_steps_(idx_BK, val_BK, residual_BD, U_MD, threshold)
        ctx.save_for_backward(idx_BK, val_BK, residual_BD, W_MD, other_MD)
        ctx.mark_non_differentiable(idx_BK)
        ctx.set_materialize_grads(False)
        ctx.detach = detach
        return idx_BK, val_BK, residual_BD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, _didx: None, dval_BK: Tensor | None, dresidual_BD: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        idx_BK, val_BK, residual_BD, W_MD, other_MD = ctx.saved_tensors
        dval_BK = torch.zeros_like(val_BK) if dval_BK is None else dval_BK.contiguous()
        if dresidual_BD is None:
            dresidual_BD = torch.zeros_like(residual_BD)
        U_MD = W_MD if other_MD is None else other_MD
        dx_BD, dW_MD, dU_MD = pursue_backward(
            idx_BK, val_BK, dval_BK, residual_BD, dresidual_BD.contiguous(), W_MD, U_MD, ctx.detach
        )
        return dx_BD, dW_MD, None if other_MD is None else dU_MD, None, None, None, None, None
