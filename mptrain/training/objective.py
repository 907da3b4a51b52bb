"""What a coder is trained on: the terms of its loss, all as shares of the target's variance.

B rows in a batch, D input width, E target width, M latents.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.coders.code import Code
from mptrain.coders.coder import Coder
from mptrain.coders.encoders.base import LossTerms
from mptrain.coders.fvu import reconstruction_loss
from mptrain.kernels.prefix_errors import prefix_squares

NESTED_SHARES = (1 / 16, 1 / 4, 1 / 2, 1.0)  # of the latents, in the loss of a nested dictionary
WIDE, _WIDE_WEIGHT = 4, 1 / 8  # times K entries a row in multi_topk (Gao et al. 2024, sec. 5.4)


class Objective:
    """The loss of one coder, as its config says."""

    def __init__(self, coder: Coder, total_variance: float, input_variance: float | None) -> None:
        """`input_variance`: for a coder with an input loss, the input's total variance."""
        if not total_variance > 0:
            raise UsageError(
                f"total_variance must be positive, got {total_variance}: a target that does not "
                "vary cannot be learned; use another target"
            )
        if coder.config.input_loss > 0 and not input_variance:
            raise UsageError(
                f"input_loss needs an input that varies, got input_variance={input_variance}; "
                "use --input-loss 0"
            )
        self.coder, self.config = coder, coder.config
        self.total_variance, self.input_variance = total_variance, input_variance

    def loss(
        self,
        code: Code,
        x_BD: Float[Tensor, "batch input"],
        y_BE: Float[Tensor, "batch target"],
        y_hat_BE: Float[Tensor, "batch target"],
        dead_M: Bool[Tensor, " latents"],
    ) -> Float[Tensor, ""]:
        """All terms but that of a wider code. Waits for the device only to count the dead."""
        loss = self._prediction_loss(code, x_BD, y_BE, y_hat_BE) + self._input_loss(code)
        loss = loss + self._auxiliary_loss(code, x_BD, (y_BE - y_hat_BE).detach(), dead_M)
        if self.coder.encoder.has_sparsity_loss:
            loss = loss + self.coder.encoder.sparsity_loss(code, self._terms(x_BD, y_BE))
        return loss

    def wide_loss(
        self,
        wide: Code,
        x_BD: Float[Tensor, "batch input"],
        y_BE: Float[Tensor, "batch target"],
    ) -> Float[Tensor, ""]:
        """The term of a code of the same rows with `WIDE` times as many entries."""
        y_hat_BE = self.coder.predict(wide, x_BD)
        return _WIDE_WEIGHT * reconstruction_loss(y_BE, y_hat_BE, self.total_variance)

    def _terms(self, x_BD: Tensor, y_BE: Tensor) -> LossTerms:
        coder = self.coder
        offset_E = coder.decode_offset(x_BD)
        return LossTerms(x_BD, y_BE, coder.b_D, coder.decoder_ME, offset_E, self.total_variance)

    def _prediction_loss(self, code: Code, x_BD: Tensor, y_BE: Tensor, y_hat_BE: Tensor) -> Tensor:
        if self.config.nested:
            return self._nested_loss(code, x_BD, y_BE)
        if not self.config.per_step_loss:
            return reconstruction_loss(y_BE, y_hat_BE, self.total_variance)
        error_BE = y_BE - self.coder.decode_offset(x_BD)
        squares_B = prefix_squares(code.idx_BK, code.val_BK, self.coder.decoder_ME, error_BE)
        return squares_B.sum() / (code.idx_BK.numel() * self.total_variance)

    def _nested_loss(self, code: Code, x_BD: Tensor, y_BE: Tensor) -> Tensor:
        """Mean over prefixes of the dictionary (Bussmann et al. 2025, arXiv 2503.17547)."""
        losses = []
        for share in NESTED_SHARES:
            is_in_BK = code.idx_BK < max(1, round(share * self.coder.latents))
            part = Code(code.idx_BK, code.val_BK * is_in_BK, None)
            y_hat_BE = self.coder.decode(part, x_BD)
            losses.append(reconstruction_loss(y_BE, y_hat_BE, self.total_variance))
        return torch.stack(losses).mean()

    def _input_loss(self, code: Code) -> Tensor | float:
        """What the pursuit leaves of the input, on the scale of `reconstruction_loss`."""
        if self.config.input_loss == 0 or code.residual_BD is None:
            return 0.0
        assert self.input_variance is not None
        left = code.residual_BD.square().sum() / (len(code.idx_BK) * self.input_variance)
        return self.config.input_loss * left

    def _auxiliary_loss(
        self, code: Code, x_BD: Tensor, error_BE: Tensor, dead_M: Tensor
    ) -> Tensor | float:
        if self.config.auxk_alpha == 0:
            return 0.0
        predicted = self.coder.predict_error(code, x_BD, dead_M)
        if predicted is None:
            return 0.0
        error_hat_BE, scale = predicted
        loss = reconstruction_loss(error_BE, error_hat_BE, self.total_variance)
        return self.config.auxk_alpha * scale * loss
