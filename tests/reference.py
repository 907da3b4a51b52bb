"""Slow and plain versions of what `mptrain` computes fast, in float64.

B rows in a batch, D input width, M latents, K pursuit steps.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Pursued(NamedTuple):
    idx_BK: NDArray[np.int64]
    val_BK: Array
    residual_BD: Array


def pursue(x_BD: Array, W_MD: Array, k: int, tolerance: float) -> Pursued:
    """Matching pursuit, row by row and atom by atom."""
    idx_BK = np.full((len(x_BD), k), -1)
    val_BK = np.zeros((len(x_BD), k))
    residual_BD = x_BD.astype(np.float64).copy()
    for row, r_D in enumerate(residual_BD):
        first_norm = np.linalg.norm(r_D)
        for step in range(k):
            score_M = W_MD @ r_D
            atom = int(score_M.argmax())
            if score_M[atom] <= 0 or np.linalg.norm(r_D) <= tolerance * first_norm:
                break
            idx_BK[row, step], val_BK[row, step] = atom, score_M[atom]
            r_D -= score_M[atom] * W_MD[atom]
    return Pursued(idx_BK, val_BK, residual_BD)


def pursue_with_graph(
    x_BD: Tensor, W_MD: Tensor, k: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Matching pursuit by autograd, which keeps every step."""
    r_BD, idx, val = x_BD, [], []
    first_norm_B = x_BD.norm(dim=1)
    for _ in range(k):
        score_BM = r_BD @ W_MD.T
        best = score_BM.max(1)
        live_B = (best.values > 0) & (r_BD.norm(dim=1) > tolerance * first_norm_B)
        a_B = torch.where(live_B, best.values, 0)
        r_BD = r_BD - a_B[:, None] * W_MD[best.indices]
        idx.append(torch.where(live_B, best.indices, -1))
        val.append(a_B)
    return torch.stack(idx, 1), torch.stack(val, 1), r_BD


def follow(
    x_BD: Tensor, W_MD: Tensor, idx_BK: Tensor, detach: bool = False
) -> tuple[Tensor, Tensor]:
    """Values and last residual of a pursuit whose choice of atoms is given, by autograd."""
    taken_BD, val = torch.zeros_like(x_BD), []
    for step in range(idx_BK.shape[1]):
        w_BD = W_MD[idx_BK[:, step].clamp_min(0)]
        r_BD = x_BD - (taken_BD.detach() if detach else taken_BD)
        a_B = (r_BD * w_BD).sum(1).masked_fill(idx_BK[:, step] < 0, 0)
        taken_BD = taken_BD + a_B[:, None] * w_BD
        val.append(a_B)
    return torch.stack(val, 1), x_BD - taken_BD


def pursue_refit(
    x_BD: Array, W_MD: Array, k: int, tolerance: float, codes: str
) -> tuple[Array, Array]:
    """Dense codes and residuals of gradient pursuit (gp) or orthogonal matching pursuit (omp)."""
    code_BM, residual_BD = np.zeros((len(x_BD), len(W_MD))), x_BD.astype(np.float64).copy()
    for x_D, code_M, r_D in zip(x_BD, code_BM, residual_BD, strict=True):
        support: list[int] = []
        for _ in range(k):
            score_M = W_MD @ r_D
            atom = int(score_M.argmax())
            if score_M[atom] <= 1e-9 or np.linalg.norm(r_D) <= tolerance * np.linalg.norm(x_D):
                break
            support += [atom] if atom not in support else []
            W_SD = W_MD[support]
            if codes == "omp":
                code_M[support] = np.linalg.lstsq(W_SD.T, x_D, rcond=None)[0]
            else:
                g_S = W_SD @ r_D
                c_D = g_S @ W_SD
                step = c_D @ r_D / (c_D @ c_D)
                code_M[support] = np.maximum(code_M[support] + step * g_S, 0)
            r_D[:] = x_D - code_M[support] @ W_SD
    return code_BM, residual_BD


def dense(idx_BK: Tensor, val_BK: Tensor, latents: int) -> Tensor:
    """The code as `[B, M]`; entries that name the same latent add."""
    code_BM = val_BK.new_zeros(len(idx_BK), latents + 1)
    return code_BM.scatter_add(1, idx_BK + 1, val_BK)[:, 1:]


def topk(x_BD: Array, b_D: Array, encoder_MD: Array, bias_M: Array, k: int) -> Array:
    """Dense TopK code: all but the `k` largest pre-activations of a row are 0."""
    pre_BM = np.maximum((x_BD - b_D) @ encoder_MD.T + bias_M, 0)
    code_BM = np.zeros_like(pre_BM)
    for row, pre_M in enumerate(pre_BM):
        kept = np.argsort(-pre_M, kind="stable")[:k]
        code_BM[row, kept] = pre_M[kept]
    return code_BM


def fvu(y_BE: Array, y_hat_BE: Array) -> float:
    centred = y_BE - y_BE.mean(0)
    return float(np.square(y_BE - y_hat_BE).sum() / np.square(centred).sum())
