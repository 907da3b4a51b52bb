"""The linear encoder of TopK, BatchTopK and GroupMax coders.

B rows in a batch, D input width, M latents, K code entries a row.
"""

from torch import Tensor

from mptrain.coders.auxk import error_by_encoder
from mptrain.coders.code import Code
from mptrain.coders.encoders.base import LinearEncoder
from mptrain.coders.topk_code import topk_encode
from mptrain.config.coder_settings import Codes
from mptrain.kernels.sparse import strongest
from mptrain.pursuit.batch_threshold import EntryThreshold


class TopKEncoder(LinearEncoder):
    """The largest entries of `relu((x - b) encoder^T + bias)` (Gao et al. 2024, sec. 2.3).

    TopK keeps `k` a row, GroupMax the largest of each of `k` groups of neighbouring latents, and
    BatchTopK (Bussmann et al. 2024, arXiv 2412.06410) those above a threshold.
    """

    def encode(
        self,
        x_BD: Tensor,
        b_D: Tensor,
        decoder_ME: Tensor,
        k: int,
        codes: Codes,
        threshold: EntryThreshold | None,
    ) -> Code:
        grouped, k = self.config.arch == "groupmax", min(k, self.latents)
        score_dtype = self.config.score_dtype
        idx_BK, val_BK = topk_encode(
            x_BD, b_D, self.encoder_MD, self.bias_M, k, grouped, score_dtype
        )
        if threshold is None:
            return Code(idx_BK, val_BK)
        least = threshold.value
        if threshold.mean_entries is not None:
            least = strongest(val_BK.detach(), threshold.mean_entries)
        dropped_BK = val_BK < least
        return Code(idx_BK.masked_fill(dropped_BK, -1), val_BK.masked_fill(dropped_BK, 0))

    def predict_error(
        self, code: Code, x_BD: Tensor, b_D: Tensor, decoder_ME: Tensor, dead_M: Tensor
    ) -> tuple[Tensor, float] | None:
        score_dtype = self.config.score_dtype
        return error_by_encoder(
            x_BD, b_D, self.encoder_MD, self.bias_M, decoder_ME, dead_M, score_dtype
        )


ENCODER = TopKEncoder
