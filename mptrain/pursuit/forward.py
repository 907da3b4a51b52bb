"""Choose atoms and values: the forward pass of matching pursuit, without gradients.

B rows in a batch, D input width, M latents, K pursuit steps; lower-case b: rows of one micro-batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.kernels.sparse import dictionary_row
from mptrain.pursuit import numba_backend, triton_backend
from mptrain.pursuit.backend import AtomSearch, microbatch_rows, resolve_backend
from mptrain.pursuit.finders import Direct, Gram, Shortlist
from mptrain.pursuit.rule import Rule

_Pursue = Callable[[Tensor, Tensor, Tensor], None]  # r_bD becomes the last residual; idx_bK, val_bK


@torch.no_grad()
def pursue_forward(
    x_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "selecting input"],
    U_MD: Float[Tensor, "subtracting input"],
    k: int,
    rule: Rule,
    search: AtomSearch,
) -> tuple[Int64[Tensor, "batch {k}"], Float[Tensor, "batch {k}"], Float[Tensor, "batch input"]]:
    """Code each row of `x` in `k` pursuit steps (Mallat & Zhang 1993, II).

    From `r = x`, a step is `j = argmax_j <w_j, r>`, `a = max(0, <w_j, r>)`, `r <- r - a u_j`, or
    as `rule` says. Matching pursuit proper has one dictionary of unit-norm atoms, `U = W`.
    A row stops where no correlation is positive or `||r|| <= tolerance ||x||`; its unused steps
    have index -1 and value 0. In blocks it goes on with the next one, and step t stays entry t.
    A row with a NaN gets NaN values, so that the loss shows it.

    All back ends take `a` from the residual itself and differ in how they find `j`. Returns
    indices, values and the last residual, all in the dtype of `x` but for the indices.
    """
    idx_BK = torch.empty(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    val_BK = torch.empty(len(x_BD), k, dtype=x_BD.dtype, device=x_BD.device)
    r_BD = x_BD.clone(memory_format=torch.contiguous_format)
    pursue_rows, elements = _prepare(W_MD, U_MD, len(x_BD) * k, rule, search)
    rows = microbatch_rows(elements, x_BD.device)
    for r_bD, idx_bK, val_bK in zip(
        *(torch.split(t, rows) for t in (r_BD, idx_BK, val_BK)), strict=True
    ):
        pursue_rows(r_bD, idx_bK, val_bK)
        if rule.block is None:
            _put_unused_last_(idx_bK, val_bK)
    return idx_BK, val_BK, r_BD


def _prepare(
    W_MD: Tensor, U_MD: Tensor, steps: int, rule: Rule, search: AtomSearch
) -> tuple[_Pursue, int]:
    """The pursuit of a micro-batch, with what all of them share, and a row's share of memory."""
    M, D = W_MD.shape
    backend = resolve_backend(search, M, steps, rule.block is not None)
    assert rule.block is None or backend == "direct", "only direct knows blocks"
    if backend == "direct":
        has_triton = rule.has_kernels and triton_backend.applies(W_MD)
        direct = triton_backend.Direct if has_triton else Direct
        return partial(_by_finder, partial(direct, W_MD, rule), W_MD, U_MD, rule), M
    low = search.score_dtype == "bfloat16"
    scoring_MD = W_MD.bfloat16() if low else W_MD
    backends = (numba_backend, triton_backend) if rule.has_kernels else ()
    kernels = next((backend for backend in backends if backend.applies(W_MD)), None)
    if backend == "gram":
        room_MM = (
            numba_backend.room_for(M, M, scoring_MD.dtype) if kernels is numba_backend else None
        )
        G_MM = torch.mm(U_MD.to(scoring_MD.dtype), scoring_MD.T, out=room_MM)
        if kernels is None or (kernels is triton_backend and low):
            return partial(_by_finder, partial(Gram, W_MD, G_MM, rule), W_MD, U_MD, rule), M
        return partial(kernels.pursue_by_gram_, G_MM, W_MD, U_MD, rule), M
    size, refresh = min(search.shortlist_size, M), search.shortlist_refresh
    elements = max(M, size * max(size, D))
    if kernels is None:
        finder = partial(Shortlist, W_MD, scoring_MD, size, refresh, rule)
        return partial(_by_finder, finder, W_MD, U_MD, rule), elements
    by_shortlist = kernels.pursue_by_shortlist_
    return partial(by_shortlist, scoring_MD, size, refresh, W_MD, U_MD, rule), elements


def _by_finder(
    new_finder: Callable[[], Direct | Gram | Shortlist],
    W_MD: Tensor,
    U_MD: Tensor,
    rule: Rule,
    r_bD: Tensor,
    idx_bK: Tensor,
    val_bK: Tensor,
) -> None:
    """Step by step, all rows at once.

    A stopped row needs no flag: its value is 0, which leaves residual and scores as they are, so
    it stops again at every later step (in blocks, may go on in a later one).
    """
    finder, stop_norm_b = new_finder(), rule.stop_norm(r_bD)
    K = idx_bK.shape[1]
    for step in range(K):
        latent_b = finder.best(r_bD, step)
        w_bD = W_MD.index_select(0, dictionary_row(latent_b, W_MD))
        a_b = rule.value_((w_bD * r_bD).sum(1))
        if rule.tolerance > 0:
            a_b.masked_fill_(torch.linalg.vector_norm(r_bD, dim=1) <= stop_norm_b, 0)
        u_bD = w_bD if U_MD is W_MD else U_MD.index_select(0, dictionary_row(latent_b, U_MD))
        r_bD.addcmul_(u_bD, a_b[:, None], value=-1)
        idx_bK[:, step] = latent_b.masked_fill(a_b == 0, -1)
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
