"""What every encoder offers to the coder that it is part of.

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mptrain.coders.code import Code
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import BeginAs, Codes
from mptrain.pursuit.batch_threshold import EntryThreshold


class LossTerms(NamedTuple):
    """What a loss of an encoder may depend on, beside its code."""

    x_BD: Tensor
    y_BE: Tensor
    b_D: Tensor
    "input bias"
    decoder_ME: Tensor
    offset_E: Tensor
    "what is predicted without any latent; `[B, E]` with a skip"
    total_variance: float
    "the target's, which losses are shares of"


class Encoder(nn.Module):
    """Computes the codes of rows. Subclasses own the parameters that this takes."""

    has_sparsity_loss: ClassVar[bool] = False

    def __init__(self, config: CoderConfig, input_width: int) -> None:
        super().__init__()
        self.config = config
        self.latents = config.latents_of(input_width)
        self.coded_as: BeginAs = "mp"
        "kind of code at present; changed by the training of an mp coder that begins as another"

    @property
    def dictionary_MD(self) -> Tensor:
        """The rows that find latents; a tied decoder predicts with them."""
        raise NotImplementedError

    @property
    def unit_norm(self) -> tuple[str, ...]:
        """Names of the parameters whose rows are kept at unit norm."""
        return ()

    def dictionaries(self) -> list[Tensor]:
        """The parameters that start as random unit-norm directions, all as the same ones."""
        return [self.dictionary_MD]

    def initialise_(self) -> None:
        """Set the parameters that start neither at 0 nor as a direction."""

    def encode(
        self,
        x_BD: Float[Tensor, "batch input"],
        b_D: Float[Tensor, " input"],
        decoder_ME: Float[Tensor, "predicting target"],
        k: int,
        codes: Codes,
        threshold: EntryThreshold | None,
    ) -> Code:
        """Code `x - b` with `k` entries a row, without those that `threshold` drops."""
        raise NotImplementedError

    def predict_error(
        self,
        code: Code,
        x_BD: Float[Tensor, "batch input"],
        b_D: Float[Tensor, " input"],
        decoder_ME: Float[Tensor, "predicting target"],
        dead_M: Bool[Tensor, " latents"],
    ) -> tuple[Float[Tensor, "batch target"], float] | None:
        """The prediction error as dead latents alone predict it, and the scale of that loss.

        None where no latent is dead, and for encoders without such a loss.
        """
        return None

    def sparsity_loss(self, code: Code, terms: LossTerms) -> Tensor:
        """The term of the loss that makes codes sparse, of an encoder that `has_sparsity_loss`."""
        raise NotImplementedError


class LinearEncoder(Encoder):
    """The parameters of an encoder that starts from `(x - b) encoder^T + bias`."""

    def __init__(self, config: CoderConfig, input_width: int) -> None:
        super().__init__(config, input_width)
        self.encoder_MD = zeros(self.latents, input_width)
        self.bias_M = zeros(self.latents)

    @property
    def dictionary_MD(self) -> Tensor:
        return self.encoder_MD


def zeros(*shape: int, trained: bool = True) -> nn.Parameter:
    """A parameter that is still to be initialised, or loaded."""
    return nn.Parameter(torch.zeros(shape), requires_grad=trained)
