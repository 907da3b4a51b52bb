"""The backward pass of a pursuit: steps are undone one by one, so none of them has to be kept.

For a step with `r_{t+1} = r_t - a u`, `a = <w, r_t>`, and `g = dL/dr_{t+1}`:

    s = dL/da - <u, g>,  dL/dw += s r_t,  dL/du += -a g,  dL/dr_t = g + s w

and nothing for an unused step.

B rows in a batch, D input width, M latents, K pursuit steps; lower-case b: rows of one micro-batch.
"""

import torch
from torch import Tensor

from mptrain.kernels.sparse import dictionary_row, entry_sums
from mptrain.pursuit import numba_backend, triton_backend

_ELEMENTS = 1 << 28  # of the [b, K, D] terms of one dictionary's gradient


def pursue_backward(
    idx_BK: Tensor,
    val_BK: Tensor,
    dval_BK: Tensor,
    residual_BD: Tensor,
    dresidual_BD: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, of the selecting and of the subtracting dictionary.

    With `detach`, no step sees through its residual what later steps made of it: `g` stays as it
    was at the end. Where both dictionaries are one, so are their gradients. The order of summation
    is fixed on every device.
    """
    of_batch = (idx_BK, val_BK, dval_BK, residual_BD, dresidual_BD)
    if numba_backend.applies(idx_BK):
        return numba_backend.pursue_backward(*of_batch, W_MD, U_MD, detach)
    if triton_backend.applies(W_MD) and len(W_MD) == len(U_MD):
        return triton_backend.pursue_backward(*of_batch, W_MD, U_MD, detach)
    dx_BD, dW_MD = dresidual_BD.clone(), torch.zeros_like(W_MD)
    dU_MD = dW_MD if U_MD is W_MD else torch.zeros_like(U_MD)
    rows = max(1, _ELEMENTS // (idx_BK.shape[1] * W_MD.shape[1]))
    parts = (torch.split(t, rows) for t in (dx_BD, *of_batch))
    for dx_bD, idx_bK, val_bK, dval_bK, residual_bD, dresidual_bD in zip(*parts, strict=True):
        _backward_rows_(
            dx_bD, idx_bK, val_bK, dval_bK, residual_bD, dresidual_bD, W_MD, U_MD, detach,
            dW_MD, dU_MD,
        )  # fmt: skip
    return dx_BD, dW_MD, dU_MD


def _backward_rows_(
    dx_bD: Tensor,
    idx_bK: Tensor,
    val_bK: Tensor,
    dval_bK: Tensor,
    residual_bD: Tensor,
    dresidual_bD: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    detach: bool,
    dW_MD: Tensor,
    dU_MD: Tensor,
) -> None:
    r_bD, g_bD = residual_bD.clone(), dresidual_bD if detach else dx_bD
    terms_W_KbD = r_bD.new_empty(idx_bK.shape[1], *r_bD.shape)
    terms_U_KbD = torch.empty_like(terms_W_KbD)
    for step in reversed(range(idx_bK.shape[1])):
        a_b1, latent_b = val_bK[:, step, None], idx_bK[:, step]
        w_bD = W_MD.index_select(0, dictionary_row(latent_b, W_MD))
        u_bD = w_bD if U_MD is W_MD else U_MD.index_select(0, dictionary_row(latent_b, U_MD))
        r_bD.addcmul_(u_bD, a_b1)
        s_b1 = dval_bK[:, step, None] - (u_bD * g_bD).sum(1, keepdim=True)
        s_b1.masked_fill_(latent_b[:, None] < 0, 0)
        torch.mul(s_b1, r_bD, out=terms_W_KbD[step])
        torch.mul(-a_b1, g_bD, out=terms_U_KbD[step])
        dx_bD.addcmul_(w_bD, s_b1)
    for terms_KbD, gradient_MD in ((terms_W_KbD, dW_MD), (terms_U_KbD, dU_MD)):
        gradient_MD += entry_sums(idx_bK.T, terms_KbD, len(gradient_MD))
