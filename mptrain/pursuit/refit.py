"""Pursuits that fit the values of all chosen atoms again at every step: gradient pursuit and
orthogonal matching pursuit.

B rows in a batch, D input width, M latents, K pursuit steps; lower-case b: rows of one micro-batch.
Once the atoms are chosen, only their Gram matrix `G_bKK` and their products with the row, `p_bK`,
matter; an entry that is not part of the fit has zeros there, so that `G_kk` is zero too.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mptrain.kernels.sparse import entry_sums
from mptrain.pursuit.rule import Rule

_CPU_ELEMENTS = 1 << 21  # of one [b, M] matrix of scores, or [b, K, D] of chosen atoms
_GPU_ELEMENTS = 1 << 28

Refit = Literal["gp", "omp"]


def refitted_pursuit(
    x_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "latents input"],
    k: int,
    rule: Rule,
    codes: Refit,
) -> tuple[Int64[Tensor, "batch {k}"], Float[Tensor, "batch {k}"], Float[Tensor, "batch input"]]:
    """Indices, values and last residual, with gradients through all of them, the choice held fixed.

    A step adds `argmax_j <w_j, r>`, or as `rule.select` says, to the support and fits its values to
    `x`, then `r` is what they leave. A row stops where no correlation is positive (unless they are
    chosen positive: where the chosen one is 0) or `||r|| <= tolerance ||x||`.

    - `gp` (Blumensath & Davies 2008): the new value starts at zero, and all go along their gradient
      `g = <w, r>` to `val + s g`, `s` such that `s sum g w` fits `r` best; if atoms are chosen
      positive, to `relu(val + s g)` (Smith 2024). An atom that is chosen again only has its value
      improved.
    - `omp` (Pati et al. 1993, who choose by magnitude): least squares, values of either sign. A row
      also stops where its best atom hardly leaves the span of its support, which rounding would
      make singular.

    All scores are computed at every step. Entries with value 0 have index -1. Kept for the
    backward pass: the chosen indices and references to the arguments; it goes through the fit of
    a micro-batch once more.
    """
    assert rule.block is None
    # torch does not annotate `apply`
    idx_BK, val_BK, residual_BD = _PursueRefit.apply(  # type: ignore[no-untyped-call]
        x_BD, W_MD, k, rule, codes
    )
    return idx_BK, val_BK, residual_BD


class _PursueRefit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_MD: Tensor, k: int, rule: Rule, codes: Refit
    ) -> tuple[Tensor, Tensor, Tensor]:
        idx_BK = torch.empty(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
        val_BK = torch.empty(len(x_BD), k, dtype=x_BD.dtype, device=x_BD.device)
        residual_BD = torch.empty_like(x_BD, memory_format=torch.contiguous_format)
        rows = refit_rows(len(W_MD), W_MD.shape[1], k, W_MD.device)
        for x_bD, idx_bK, val_bK, r_bD in _microbatches(rows, x_BD, idx_BK, val_BK, residual_BD):
            _choose_(x_bD, W_MD, rule, codes, idx_bK, val_bK, r_bD)
        ctx.save_for_backward(idx_BK, x_BD, W_MD)
        ctx.rule, ctx.codes = rule, codes
        ctx.set_materialize_grads(False)
        shown_BK = idx_BK.masked_fill(val_BK == 0, -1)
        ctx.mark_non_differentiable(shown_BK)
        return shown_BK, val_BK, residual_BD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, _didx: None, dval_BK: Tensor | None, dresidual_BD: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None, None]:
        idx_BK, x_BD, W_MD = ctx.saved_tensors
        dval_BK = torch.zeros_like(idx_BK, dtype=x_BD.dtype) if dval_BK is None else dval_BK
        dresidual_BD = torch.zeros_like(x_BD) if dresidual_BD is None else dresidual_BD
        dx_BD, dW_MD = torch.empty_like(x_BD), torch.zeros_like(W_MD)
        rows = refit_rows(len(W_MD), W_MD.shape[1], idx_BK.shape[1], W_MD.device)
        for idx_bK, x_bD, dval_bK, dr_bD, dx_bD in _microbatches(
            rows, idx_BK, x_BD, dval_BK, dresidual_BD, dx_BD
        ):
            with torch.enable_grad():
                x_bD = x_bD.detach().requires_grad_()
                w_bKD = _atoms(W_MD, idx_bK).requires_grad_()
                val_bK, r_bD = _fit_again(x_bD, w_bKD, idx_bK, ctx.rule, ctx.codes)
            dx_b, dw_bKD = torch.autograd.grad((val_bK, r_bD), (x_bD, w_bKD), (dval_bK, dr_bD))
            dx_bD.copy_(dx_b)
            dW_MD += entry_sums(idx_bK, dw_bKD, len(W_MD))
        return dx_BD, dW_MD, None, None, None


def _choose_(
    x_bD: Tensor,
    W_MD: Tensor,
    rule: Rule,
    codes: Refit,
    idx_bK: Tensor,
    val_bK: Tensor,
    r_bD: Tensor,
) -> None:
    """Run the pursuit of one micro-batch into `idx`, `val` and `r`."""
    b, K = idx_bK.shape
    r_bD.copy_(x_bD)
    idx_bK.fill_(-1)
    val_bK.zero_()
    w_bKD = x_bD.new_zeros(b, K, W_MD.shape[1])
    G_bKK, p_bK = x_bD.new_zeros(b, K, K), x_bD.new_zeros(b, K)
    stop_norm_b = rule.stop_norm(x_bD)
    for step in range(K):
        atom_b = rule.best(r_bD @ W_MD.T)
        w_bD = W_MD.index_select(0, atom_b)
        goes_on_b = _goes_on(w_bD, r_bD, stop_norm_b, rule)
        if codes == "omp":
            goes_on_b &= _leaves_span(G_bKK, torch.bmm(w_bKD, w_bD[:, :, None])[:, :, 0], w_bD)
        is_new_b = goes_on_b & (idx_bK != atom_b[:, None]).all(1)
        idx_bK[:, step] = atom_b.masked_fill(~goes_on_b, -1)
        w_bKD[:, step] = w_bD * is_new_b[:, None]
        # where the atom is not new its row is zero, and so are its products
        G_bKK[:, step] = torch.bmm(w_bKD, w_bKD[:, step, :, None])[:, :, 0]
        G_bKK[:, :, step] = G_bKK[:, step]
        p_bK[:, step] = (w_bKD[:, step] * x_bD).sum(1)
        if codes == "gp":
            fitted_bK = _gp_step(G_bKK, p_bK, val_bK, rule)
        else:
            fitted_bK = _least_squares(G_bKK, p_bK)
        val_bK.copy_(torch.where(goes_on_b[:, None], fitted_bK, val_bK))
        r_bD.copy_(x_bD - torch.bmm(val_bK[:, None], w_bKD)[:, 0])


def _goes_on(w_bD: Tensor, r_bD: Tensor, stop_norm_b: Tensor, rule: Rule) -> Tensor:
    """Whether each row takes one more step; written so that a NaN goes on, and shows."""
    a_b, norm_b = (w_bD * r_bD).sum(1), torch.linalg.vector_norm(r_bD, dim=1)
    if rule.select != "positive":
        a_b = a_b.abs()
    rounding = 100 * torch.finfo(r_bD.dtype).eps
    stops_b: Tensor = (a_b <= rounding * norm_b) | (norm_b <= stop_norm_b)
    return ~stops_b


def _leaves_span(G_bKK: Tensor, products_bK: Tensor, w_bD: Tensor) -> Tensor:
    """Whether an atom's part outside the span of the support is more than rounding."""
    inside_b = (products_bK * _least_squares(G_bKK, products_bK)).sum(1)
    norm_b = w_bD.square().sum(1)
    is_inside_b: Tensor = norm_b - inside_b <= torch.finfo(w_bD.dtype).eps ** 0.6 * norm_b
    return ~is_inside_b


def _fit_again(
    x_bD: Tensor, w_bKD: Tensor, idx_bK: Tensor, rule: Rule, codes: Refit
) -> tuple[Tensor, Tensor]:
    """Values and residual of a pursuit whose choice is known, differentiable."""
    w_bKD = w_bKD * _is_first(idx_bK)[:, :, None]
    G_bKK, p_bK = w_bKD @ w_bKD.transpose(1, 2), (w_bKD * x_bD[:, None]).sum(2)
    if codes == "omp":
        val_bK = _least_squares(G_bKK, p_bK)
    else:
        val_bK = torch.zeros_like(p_bK)
        for step in range(idx_bK.shape[1]):
            within_K = torch.arange(idx_bK.shape[1], device=x_bD.device) <= step
            stepped_bK = _gp_step(G_bKK * within_K, p_bK * within_K, val_bK, rule)
            val_bK = torch.where(idx_bK[:, step, None] >= 0, stepped_bK, val_bK)
    return val_bK, x_bD - (val_bK[:, None] @ w_bKD)[:, 0]


def _gp_step(G_bKK: Tensor, p_bK: Tensor, val_bK: Tensor, rule: Rule) -> Tensor:
    """`val + s g` with `g = p - G val` and `s = |g|^2 / g G g`; its positive part by that rule."""
    # an atom of the support may well have p = 0: it meets not the row, but what others left of it
    fitted_bK = torch.diagonal(G_bKK, dim1=1, dim2=2) != 0
    g_bK = torch.where(fitted_bK, p_bK - (G_bKK @ val_bK[:, :, None])[:, :, 0], 0)
    length_b1 = (g_bK * (G_bKK @ g_bK[:, :, None])[:, :, 0]).sum(1, keepdim=True)
    s_b1 = g_bK.square().sum(1, keepdim=True) / torch.where(length_b1 == 0, 1, length_b1)
    stepped_bK = val_bK + s_b1 * g_bK
    return torch.relu(stepped_bK) if rule.select == "positive" else stepped_bK


def _least_squares(G_bKK: Tensor, p_bK: Tensor) -> Tensor:
    """`G^-1 p`, in float64: atoms of a trained dictionary can be nearly dependent."""
    G_bKK = G_bKK.double()
    unused_bK = torch.diagonal(G_bKK, dim1=1, dim2=2) == 0
    lower_bKK, _ = torch.linalg.cholesky_ex(G_bKK + torch.diag_embed(unused_bK.double()))
    return torch.cholesky_solve(p_bK.double()[:, :, None], lower_bKK)[:, :, 0].to(p_bK.dtype)


def _is_first(idx_bK: Tensor) -> Tensor:
    """Whether an entry is used and names a latent for the first time in its row."""
    same_bKK = idx_bK[:, :, None] == idx_bK[:, None]
    return (idx_bK >= 0) & (same_bKK.tril(-1).sum(2) == 0)


def _atoms(W_MD: Tensor, idx_bK: Tensor) -> Tensor:
    flat = W_MD.detach().index_select(0, idx_bK.clamp_min(0).flatten())
    return flat.view(*idx_bK.shape, -1)


def refit_rows(M: int, D: int, k: int, device: torch.device) -> int:
    """Rows of a micro-batch."""
    elements = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    return max(1, elements // max(M, k * D))


def _microbatches(rows: int, *of_batch: Tensor) -> "zip[tuple[Tensor, ...]]":
    return zip(*(torch.split(t, rows) for t in of_batch), strict=True)
