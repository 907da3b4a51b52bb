"""Auxiliary loss for dead latents: what they alone would make of the error (Gao et al. 2024, A.2).

The strongest `k_aux = D / 2` dead latents predict `y - y_hat`, without a bias. With fewer dead than
that, all of them, and the loss is scaled by dead / `k_aux`, as sparsify does.

B rows in a batch, D input width, E target width, M latents, K dead latents used in a row.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mptrain.coders.topk_code import topk_encode
from mptrain.config.coder_settings import ScoreDtype
from mptrain.kernels.sparse import dictionary_row, sparse_decode, weighted_rows


def error_by_encoder(
    x_BD: Float[Tensor, "batch input"],
    b_D: Float[Tensor, " input"],
    encoder_MD: Float[Tensor, "latents input"],
    bias_M: Float[Tensor, " latents"],
    decoder_ME: Float[Tensor, "predicting target"],
    dead_M: Bool[Tensor, " latents"],
    score_dtype: ScoreDtype = "float32",
) -> tuple[Float[Tensor, "batch target"], float] | None:
    """For topk: the error as predicted from `x`, and the loss' scale. None: nothing is dead."""
    dead = dead_M.nonzero()[:, 0]
    if len(dead) == 0:
        return None
    k, scale = _used(len(dead), x_BD.shape[1])
    idx_BK, val_BK = topk_encode(
        x_BD, b_D, encoder_MD[dead], bias_M[dead], k, score_dtype=score_dtype
    )
    return sparse_decode(idx_BK, val_BK, decoder_ME[dictionary_row(dead, decoder_ME)]), scale


def error_by_residual(
    residual_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "selecting input"],
    U_MD: Float[Tensor, "subtracting input"],
    decoder_ME: Float[Tensor, "predicting target"],
    dead_M: Bool[Tensor, " latents"],
    score_dtype: ScoreDtype = "float32",
) -> tuple[Float[Tensor, "batch target"], float] | None:
    """For mp: the same from what the pursuit left, by its correlations with dead atoms.

    Values are `s max(0, <w, r>)`, each row's `s` such that what its atoms would subtract fits `r`
    best, as in gradient pursuit: unit-norm atoms that point the same way would overshoot together,
    and the loss would drive them off. `s` is held constant.
    """
    dead = dead_M.nonzero()[:, 0]
    if len(dead) == 0:
        return None
    k, scale = _used(len(dead), residual_BD.shape[1])
    W_dead_MD = W_MD[dictionary_row(dead, W_MD)]
    no_bias_D, no_bias_M = residual_BD.new_zeros(W_MD.shape[1]), residual_BD.new_zeros(len(dead))
    idx_BK, val_BK = topk_encode(
        residual_BD, no_bias_D, W_dead_MD, no_bias_M, k, score_dtype=score_dtype
    )
    with torch.no_grad():
        sum_BD = weighted_rows(idx_BK, val_BK, U_MD[dictionary_row(dead, U_MD)])
        square_B1 = sum_BD.square().sum(1, keepdim=True)
        s_B1 = (residual_BD * sum_BD).sum(1, keepdim=True) / square_B1
        s_B1.masked_fill_(square_B1 == 0, 0)
    return sparse_decode(idx_BK, s_B1 * val_BK, decoder_ME[dictionary_row(dead, decoder_ME)]), scale


def _used(dead: int, input_width: int) -> tuple[int, float]:
    """How many dead latents predict in each row, and the loss' scale."""
    k_aux = max(1, round(input_width / 2))
    return min(k_aux, dead), min(dead / k_aux, 1.0)
