"""The encoder of ReLU coders with an L1 penalty, and sparse codes of dense activations.

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

import torch
from torch import Tensor

from mptrain.coders.code import Code
from mptrain.coders.encoders.base import LinearEncoder, LossTerms
from mptrain.config.coder_settings import Codes
from mptrain.pursuit.batch_threshold import EntryThreshold


class ReluEncoder(LinearEncoder):
    """`relu((x - b) encoder^T + bias)`, all positive latents of a row (Bricken et al. 2023).

    The penalty is `sum_m val_m ||v_m||` (Conerly et al. 2024, Circuits Updates of April): weighted
    by the norm of each decoder row, so that it does not shrink values by growing the decoder.
    """

    has_sparsity_loss = True

    def encode(
        self,
        x_BD: Tensor,
        b_D: Tensor,
        decoder_ME: Tensor,
        k: int,
        codes: Codes,
        threshold: EntryThreshold | None,
    ) -> Code:
        act_BM = ((x_BD - b_D) @ self.encoder_MD.T + self.bias_M).relu()
        return sparse_code(act_BM)._replace(penalised_BM=act_BM)

    def sparsity_loss(self, code: Code, terms: LossTerms) -> Tensor:
        assert code.penalised_BM is not None
        penalty = l1_penalty(code.penalised_BM, terms.decoder_ME, terms.total_variance)
        return self.config.sparsity_weight * penalty


def sparse_code(act_BM: Tensor, is_near_BM: Tensor | None = None) -> Code:
    """The positive activations of each row as entries, as many as the fullest row has.

    Latents that `is_near_BM` names are entries too: of value 0, but with a gradient. Waits for the
    device to know how many entries there are. Early in training that is a large share of all
    latents.
    """
    key_BM = act_BM.detach()
    if is_near_BM is not None:
        smallest = torch.finfo(key_BM.dtype).tiny
        key_BM = torch.where(is_near_BM & (key_BM == 0), smallest, key_BM)
    most = int((key_BM > 0).sum(1).max()) if len(key_BM) else 0
    key_BK, idx_BK = key_BM.topk(max(1, most))
    unused_BK = key_BK <= 0
    val_BK = act_BM.gather(1, idx_BK).masked_fill(unused_BK, 0)
    return Code(idx_BK.masked_fill(unused_BK, -1), val_BK)


def l1_penalty(act_BM: Tensor, decoder_ME: Tensor, total_variance: float) -> Tensor:
    """Mean over rows of `sum_m act_m ||v_m||`, in units of the target's standard deviation."""
    weighted_BM = act_BM * decoder_ME.norm(dim=1)
    mean: Tensor = weighted_BM.sum() / (len(act_BM) * total_variance**0.5)
    return mean


ENCODER = ReluEncoder
