"""The encoder of gated coders (Rajamanoharan et al. 2024, arXiv 2404.16014).

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

from torch import Tensor

from mptrain.coders.code import Code
from mptrain.coders.encoders.base import LinearEncoder, LossTerms, zeros
from mptrain.coders.encoders.relu import l1_penalty, sparse_code
from mptrain.coders.fvu import reconstruction_loss
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Codes
from mptrain.pursuit.batch_threshold import EntryThreshold


class GatedEncoder(LinearEncoder):
    """`H(gate) relu(value)`: one linear map decides which latents are active, another their values.

    `gate = (x - b) encoder^T + gate_bias`, and `value = exp(log_scale) (x - b) encoder^T + bias`
    has the same rows, each with a scale of its own (eq. 7). The loss adds an L1 penalty on
    `relu(gate)` and the error of a prediction by `relu(gate)` with the decoder held fixed (eq. 8):
    these train the gate, through which the prediction itself has no gradient.
    """

    has_sparsity_loss = True

    def __init__(self, config: CoderConfig, input_width: int) -> None:
        super().__init__(config, input_width)
        self.gate_bias_M = zeros(self.latents)
        self.log_scale_M = zeros(self.latents)

    def encode(
        self,
        x_BD: Tensor,
        b_D: Tensor,
        decoder_ME: Tensor,
        k: int,
        codes: Codes,
        threshold: EntryThreshold | None,
    ) -> Code:
        product_BM = (x_BD - b_D) @ self.encoder_MD.T
        gate_BM = product_BM + self.gate_bias_M
        value_BM = (product_BM * self.log_scale_M.exp() + self.bias_M).relu()
        return sparse_code(value_BM * (gate_BM > 0))._replace(penalised_BM=gate_BM.relu())

    def sparsity_loss(self, code: Code, terms: LossTerms) -> Tensor:
        assert code.penalised_BM is not None
        gate_BM, decoder_ME = code.penalised_BM, terms.decoder_ME.detach()
        penalty = l1_penalty(gate_BM, decoder_ME, terms.total_variance)
        y_hat_BE = gate_BM @ decoder_ME + terms.offset_E.detach()
        error = reconstruction_loss(terms.y_BE, y_hat_BE, terms.total_variance)
        return self.config.sparsity_weight * penalty + error


ENCODER = GatedEncoder
