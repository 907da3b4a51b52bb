"""Choose atoms and values: the forward pass of matching pursuit, without gradients.

B rows in a batch, D input width, M latents, K pursuit steps; lower-case b: rows of one micro-batch.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.pursuit.search import Finder, Search, finders, microbatch_rows


def select(
    x_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "latents input"],
    k: int,
    tolerance: float,
    search: Search,
) -> tuple[Int64[Tensor, "batch {k}"], Float[Tensor, "batch {k}"], Float[Tensor, "batch input"]]:
    """Code each row of `x` in `k` pursuit steps over unit-norm atoms (Mallat & Zhang 1993, II).

    From `r = x`, a step is `j = argmax_j <w_j, r>`, `a = max(0, <w_j, r>)`, `r <- r - a w_j`.
    A row stops where no correlation is positive or `||r|| <= tolerance ||x||`; its unused steps
    have index -1 and value 0. A row with a NaN gets NaN values, so that the loss shows it.

    All back ends (`mptrain.pursuit.atoms`) take `a` from the residual itself and differ in how
    they find `j`. Returns indices, values and the last residual, all in the dtype of `x` but for
    the indices.
    """
    B = x_BD.shape[0]
    idx_BK = torch.empty(B, k, dtype=torch.int64, device=x_BD.device)
    val_BK = torch.empty(B, k, dtype=x_BD.dtype, device=x_BD.device)
    r_BD = x_BD.clone(memory_format=torch.contiguous_format)
    new_finder = finders(W_MD, search)
    rows = microbatch_rows(search, W_MD.shape[0], x_BD.device)
    for idx_bK, val_bK, r_bD in zip(
        *(torch.split(t, rows) for t in (idx_BK, val_BK, r_BD)), strict=True
    ):
        _pursue_rows_(r_bD, W_MD, new_finder(), tolerance, idx_bK, val_bK)
        _put_unused_last_(idx_bK, val_bK)
    return idx_BK, val_BK, r_BD


def _pursue_rows_(
    r_bD: Tensor, W_MD: Tensor, finder: Finder, tolerance: float, idx_bK: Tensor, val_bK: Tensor
) -> None:
    """Run the pursuit of one micro-batch; `r_bD` becomes the last residual.

    A stopped row needs no flag: its value is 0, which leaves residual and scores as they are, so
    it stops again at every later step.
    """
    floor_b = tolerance * torch.linalg.vector_norm(r_bD, dim=1)
    K = idx_bK.shape[1]
    for step in range(K):
        atom_b = finder.best(r_bD, step)
        w_bD = W_MD.index_select(0, atom_b)
        a_b = (w_bD * r_bD).sum(1).clamp_min_(0)
        if tolerance > 0:
            a_b.masked_fill_(torch.linalg.vector_norm(r_bD, dim=1) <= floor_b, 0)
        r_bD.addcmul_(w_bD, a_b[:, None], value=-1)
        idx_bK[:, step] = atom_b.masked_fill(a_b <= 0, -1)
        val_bK[:, step] = a_b
        if step + 1 < K:
            finder.subtract_(a_b)


def _put_unused_last_(idx_bK: Tensor, val_bK: Tensor) -> None:
    """Close the gaps of rows that found no candidate, and then did in a new shortlist."""
    unused_bK = idx_bK < 0
    if (unused_bK[:, 1:] >= unused_bK[:, :-1]).all():
        return
    order_bK = unused_bK.sort(dim=1, stable=True).indices
    idx_bK.copy_(idx_bK.gather(1, order_bK))
    val_bK.copy_(val_bK.gather(1, order_bK))
