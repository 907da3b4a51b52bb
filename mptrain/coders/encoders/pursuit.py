"""The encoder of matching-pursuit coders.

B rows in a batch, D input width, M latents, K pursuit steps. Dictionaries have a row for each
latent, or one for each latent of a block where all blocks share them.
"""

from torch import Tensor

from mptrain.coders.auxk import error_by_encoder, error_by_residual
from mptrain.coders.code import Code
from mptrain.coders.encoders.base import Encoder, zeros
from mptrain.coders.topk_code import topk_encode
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Codes
from mptrain.pursuit.autograd import matching_pursuit
from mptrain.pursuit.backend import AtomSearch
from mptrain.pursuit.batch_threshold import EntryThreshold
from mptrain.pursuit.refit import refitted_pursuit
from mptrain.pursuit.rule import Rule


class PursuitEncoder(Encoder):
    """Matching pursuit on a dictionary `W`, by the rule and the back end that the config names.

    With subtract separate, steps subtract the rows of another dictionary `U`.
    """

    def __init__(self, config: CoderConfig, input_width: int) -> None:
        super().__init__(config, input_width)
        shares_block = config.blocks == "predicting"
        rows = self.latents // config.required_k if shares_block else self.latents
        self.W_MD = zeros(rows, input_width)
        self.U_MD = zeros(rows, input_width) if config.subtract == "separate" else None

    @property
    def dictionary_MD(self) -> Tensor:
        return self.W_MD

    @property
    def unit_norm(self) -> tuple[str, ...]:
        if self.config.free_norm:
            return ()
        return ("W_MD",) if self.U_MD is None else ("W_MD", "U_MD")

    def dictionaries(self) -> list[Tensor]:
        return [self.W_MD] if self.U_MD is None else [self.W_MD, self.U_MD]

    @property
    def search(self) -> AtomSearch:
        """The search for atoms."""
        config = self.config
        return AtomSearch(
            backend=config.backend,
            shortlist_size=config.shortlist_size,
            shortlist_refresh=config.shortlist_refresh,
            score_dtype=config.score_dtype,
        )

    @property
    def rule(self) -> Rule:
        """What each step chooses."""
        return Rule.of(self.config, self.latents)

    def encode(
        self,
        x_BD: Tensor,
        b_D: Tensor,
        decoder_ME: Tensor,
        k: int,
        codes: Codes,
        threshold: EntryThreshold | None,
    ) -> Code:
        if self.coded_as != "mp":
            is_grouped, no_bias_M = self.coded_as == "groupmax", self._no_bias_M()
            score_dtype = self.config.score_dtype
            return Code(*topk_encode(x_BD, b_D, self.W_MD, no_bias_M, k, is_grouped, score_dtype))
        rule, r_BD = self.rule, x_BD - b_D
        if codes != "mp":
            return Code(*refitted_pursuit(r_BD, self.W_MD, k, rule, codes))
        U_MD, detach = self._subtracted(decoder_ME), self.config.detach
        return Code(
            *matching_pursuit(r_BD, self.W_MD, U_MD, k, rule, self.search, detach, threshold)
        )

    def predict_error(
        self, code: Code, x_BD: Tensor, b_D: Tensor, decoder_ME: Tensor, dead_M: Tensor
    ) -> tuple[Tensor, float] | None:
        score_dtype = self.config.score_dtype
        if code.residual_BD is None:
            no_bias_M = self._no_bias_M()
            return error_by_encoder(
                x_BD, b_D, self.W_MD, no_bias_M, decoder_ME, dead_M, score_dtype
            )
        residual_BD, U_MD = code.residual_BD.detach(), self._subtracted(decoder_ME)
        return error_by_residual(residual_BD, self.W_MD, U_MD, decoder_ME, dead_M, score_dtype)

    def _subtracted(self, decoder_ME: Tensor) -> Tensor:
        """The dictionary whose rows steps subtract; `W` itself where that is the same."""
        if self.config.subtract == "predicting":
            return decoder_ME
        return self.W_MD if self.U_MD is None else self.U_MD

    def _no_bias_M(self) -> Tensor:
        return self.W_MD.new_zeros(len(self.W_MD))


ENCODER = PursuitEncoder
