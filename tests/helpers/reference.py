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


def pursue(
    x_BD: Array,
    W_MD: Array,
    k: int,
    tolerance: float = 0.0,
    *,
    U_MD: Array | None = None,
    select: str = "positive",
    block: int | None = None,
) -> Pursued:
    """Matching pursuit, row by row and atom by atom.

    A step that finds no atom changes nothing; without blocks, no later step finds an atom either.
    """
    U_MD = W_MD if U_MD is None else U_MD
    idx_BK, val_BK = np.full((len(x_BD), k), -1), np.zeros((len(x_BD), k))
    residual_BD = x_BD.astype(np.float64).copy()
    for row, r_D in enumerate(residual_BD):
        first_norm, chosen = np.linalg.norm(r_D), list[int]()
        for step in range(k):
            first, end = (0, len(W_MD)) if block is None else (step * block, (step + 1) * block)
            latents = list(range(first, end))
            if np.linalg.norm(r_D) <= tolerance * first_norm:
                continue
            # a sum for each row alone: equal rows have equal scores
            scores = (W_MD[np.array(latents) % len(W_MD)] * r_D).sum(1)
            best = int(np.argmax(np.abs(scores) if select == "magnitude" else scores))
            latent, a = latents[best], float(scores[best])
            if a == 0 or (select == "positive" and a < 0):
                continue
            idx_BK[row, len(chosen)], val_BK[row, len(chosen)] = latent, a
            chosen.append(latent)
            r_D -= a * U_MD[latent % len(U_MD)]
    return Pursued(idx_BK, val_BK, residual_BD)


def cut(
    idx_BK: NDArray[np.int64], val_BK: Array, mean_steps: int | None, threshold: float
) -> NDArray[np.int64]:
    """The steps that a batch pursuit keeps; -1 for the other steps."""
    lowest_BK = np.minimum.accumulate(np.abs(val_BK), 1)
    if mean_steps is not None:
        descending = np.sort(lowest_BK, axis=None)[::-1]
        threshold = descending[min(mean_steps * len(val_BK), val_BK.size) - 1]
    return np.where(lowest_BK >= threshold, idx_BK, -1)


def follow(
    x_BD: Tensor,
    W_MD: Tensor,
    idx_BK: Tensor,
    U_MD: Tensor | None = None,
    detach: bool = False,
) -> tuple[Tensor, Tensor]:
    """Values and last residual of a pursuit whose choice of atoms is given, by autograd."""
    U_MD = W_MD if U_MD is None else U_MD
    taken_BD, val = torch.zeros_like(x_BD), []
    for latent_B in idx_BK.T:
        w_BD, u_BD = W_MD[latent_B % len(W_MD)], U_MD[latent_B % len(U_MD)]
        r_BD = x_BD - (taken_BD.detach() if detach else taken_BD)
        a_B = (r_BD * w_BD).sum(1).masked_fill(latent_B < 0, 0)
        taken_BD = taken_BD + a_B[:, None] * u_BD
        val.append(a_B)
    return torch.stack(val, 1), x_BD - taken_BD


def refitted_pursuit(
    x_BD: Array, W_MD: Array, k: int, tolerance: float, codes: str, select: str = "positive"
) -> tuple[Array, Array]:
    """Dense codes and residuals of gradient pursuit (gp) or orthogonal matching pursuit (omp)."""
    code_BM, residual_BD = np.zeros((len(x_BD), len(W_MD))), x_BD.astype(np.float64).copy()
    for x_D, code_M, r_D in zip(x_BD, code_BM, residual_BD, strict=True):
        support: list[int] = []
        for _ in range(k):
            score_M = W_MD @ r_D
            atom = int(np.argmax(np.abs(score_M) if select == "magnitude" else score_M))
            size = score_M[atom] if select == "positive" else np.abs(score_M[atom])
            if size <= 1e-9 or np.linalg.norm(r_D) <= tolerance * np.linalg.norm(x_D):
                break
            support += [atom] if atom not in support else []
            W_SD = W_MD[support]
            if codes == "omp":
                code_M[support] = np.linalg.lstsq(W_SD.T, x_D, rcond=None)[0]
            else:
                g_S = W_SD @ r_D
                c_D = g_S @ W_SD
                code_M[support] += c_D @ r_D / (c_D @ c_D) * g_S
                if select == "positive":
                    code_M[support] = np.maximum(code_M[support], 0)
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
