"""The decoder of a coder: rows of its own, or those of the encoder, and a linear skip.

B rows in a batch, D input width, E target width, M latents.
"""

from torch import Tensor, nn

from mptrain.coders.code import Code
from mptrain.coders.encoders.base import zeros
from mptrain.config.coder import CoderConfig
from mptrain.kernels.sparse import sparse_decode


class Decoder(nn.Module):
    """`sum_k val_k v_k + c (+ S x)`; the bias `c` is the coder's.

    A pursuit's SAE is tied: its encoder's rows predict (`V_ME` is None), unless its steps subtract
    the predicting rows. Other SAEs start with the encoder's rows, transcoders with zeros.
    """

    def __init__(self, config: CoderConfig, input_width: int, target_width: int) -> None:
        super().__init__()
        self.config = config
        is_sae, subtracts_own = config.kind == "sae", config.subtract == "predicting"
        latents = config.latents_of(input_width)
        rows = latents // config.required_k if config.blocks == "selecting" else latents
        is_tied = is_sae and config.architecture.is_pursuit and not subtracts_own
        self.starts_as_encoder = not is_tied and (is_sae or subtracts_own)
        self.V_ME = None if is_tied else zeros(rows, target_width)
        # Paulo et al. 2025, arXiv 2501.18823
        is_skip = config.kind == "skip-transcoder"
        self.S_ED = zeros(target_width, input_width) if is_skip else None

    @property
    def unit_norm(self) -> tuple[str, ...]:
        """Names of the parameters whose rows are kept at unit norm."""
        if self.config.architecture.is_pursuit:
            subtracts_own = self.config.subtract == "predicting"
            return ("V_ME",) if subtracts_own and not self.config.free_norm else ()
        return ("V_ME",) if self.config.kind == "sae" else ()

    def rows(self, encoder_MD: Tensor) -> Tensor:
        """What each latent adds to the prediction, `[M, E]`."""
        return encoder_MD if self.V_ME is None else self.V_ME

    def decode(self, code: Code, rows_ME: Tensor, bias_E: Tensor, x_BD: Tensor) -> Tensor:
        """The prediction, `[B, E]`; without a skip `x` does not matter."""
        return sparse_decode(code.idx_BK, code.val_BK, rows_ME) + self.offset(bias_E, x_BD)

    def offset(self, bias_E: Tensor, x_BD: Tensor) -> Tensor:
        """What is predicted without any latent: `[E]`, or `[B, E]` with a skip."""
        if self.S_ED is None:
            return bias_E
        return bias_E + x_BD.to(self.S_ED.dtype) @ self.S_ED.T
