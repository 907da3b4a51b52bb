"""Pursuits on an NVIDIA GPU, in Triton kernels, with the functions of `numba_backend`.

b rows of one micro-batch, B of a batch, D input width, M latents, K pursuit steps.
Triton is imported when it is known to be there.
"""

import torch
from torch import Tensor

from mptrain.kernels import triton_support
from mptrain.kernels.sparse import dictionary_row
from mptrain.pursuit import finders
from mptrain.pursuit.rule import Rule


def applies(dictionary_MD: Tensor) -> bool:
    """Whether these kernels are for the device and dtype of a dictionary."""
    return dictionary_MD.dtype == torch.float32 and triton_support.available(dictionary_MD.device)


class Direct(finders.Direct):
    """The product and its argmax in one kernel: no scores are written."""

    def _best_column(self, r_bD: Tensor, W_mD: Tensor, step: int) -> Tensor:
        from mptrain.pursuit.triton_search import best_atoms

        return best_atoms(r_bD, W_mD, self.rule.select)


def pursue_by_gram_(
    G_MM: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    rule: Rule,
    r_bD: Tensor,
    idx_bK: Tensor,
    val_bK: Tensor,
) -> None:
    """All steps of a micro-batch, its scores in registers; as `numba_backend.pursue_by_gram_`."""
    from mptrain.pursuit.triton_steps import gram_steps_

    gram_steps_(
        r_bD, r_bD @ W_MD.T, G_MM, W_MD, U_MD, idx_bK, val_bK, rule.stop_norm(r_bD),
        rule.select,
    )  # fmt: skip


def pursue_by_shortlist_(
    scoring_MD: Tensor,
    size: int,
    refresh: int,
    W_MD: Tensor,
    U_MD: Tensor,
    rule: Rule,
    r_bD: Tensor,
    idx_bK: Tensor,
    val_bK: Tensor,
) -> None:
    """As `numba_backend` does, but of each group of latents only the best is listed."""
    from mptrain.pursuit.triton_search import best_candidates
    from mptrain.pursuit.triton_steps import shortlist_steps_

    stop_norm_b, K = rule.stop_norm(r_bD), idx_bK.shape[1]
    for first in range(0, K, refresh):
        candidate_bS = best_candidates(r_bD, scoring_MD, size, rule.select)
        here = slice(first, min(first + refresh, K))
        shortlist_steps_(
            r_bD, candidate_bS, W_MD, U_MD, idx_bK[:, here], val_bK[:, here], stop_norm_b,
            rule.select,
        )  # fmt: skip


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
    """Gradients of the rows and of both dictionaries, which have equally many rows."""
    from mptrain.pursuit import triton_backward

    row_BK = torch.where(idx_BK < 0, -1, dictionary_row(idx_BK, W_MD))
    dx_BD, dW_MD, dU_MD = triton_backward.pursue_backward(
        row_BK, val_BK, dval_BK, residual_BD, dresidual_BD, W_MD, U_MD, detach
    )
    return dx_BD, dW_MD, dW_MD if dU_MD is None else dU_MD
