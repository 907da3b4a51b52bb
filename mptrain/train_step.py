"""One coder in training: its state, and one train step.

B rows in a batch, D input width, E target width, M latents.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mptrain.coder import Code, Coder
from mptrain.loss import batch_fvu, reconstruction_loss
from mptrain.optimize import Optimizers
from mptrain.prefix import prefix_squares
from mptrain.sparse import active_latents

NESTED_SHARES = (1 / 16, 1 / 4, 1 / 2, 1.0)  # of the latents, in the loss of a nested dictionary


class StepResult(NamedTuple):
    """What one train step saw, before its update. Reading a tensor waits for the device."""

    loss: Tensor
    "reconstruction and auxiliary loss; not finite: the parameters are spoilt, do not save them"
    fvu: Tensor
    "of this batch, by its own mean"
    code: Code
    "of this batch, without gradients"

    @property
    def l0(self) -> Tensor:
        """Mean number of distinct latents with a non-zero value."""
        return active_latents(self.code.idx_BK, self.code.val_BK).double().mean()


class Learner:
    """A coder, its optimizers, and for how many rows each latent has not fired."""

    def __init__(
        self,
        coder: Coder,
        optimizers: Optimizers,
        total_variance: float,
        input_variance: float | None = None,
    ) -> None:
        """`input_variance`: for a coder with an input loss, the input's total variance."""
        if not total_variance > 0:
            raise ValueError(
                f"total_variance must be positive, got {total_variance}; "
                "a target that does not vary cannot be learned"
            )
        self.coder = coder
        self.optimizers = optimizers
        self.total_variance = total_variance
        assert coder.config.input_loss == 0 or input_variance
        self.input_variance = input_variance
        self.rows_since_fired_M = torch.zeros(
            coder.latents, dtype=torch.int64, device=coder.b_D.device
        )

    def step(
        self, x_BD: Float[Tensor, "batch input"], y_BE: Float[Tensor, "batch target"]
    ) -> StepResult:
        """Update coder, optimizers and counters once; for an SAE `y` is `x`.

        Waits for no device but in the auxiliary loss, which counts the dead.
        """
        code = self.coder.encode(x_BD, over_batch=True)
        y_hat_BE = self.coder.predict(code, x_BD)
        loss = self._prediction_loss(code, x_BD, y_BE, y_hat_BE) + self._input_loss(code)
        loss = loss + self._auxiliary_loss(code, x_BD, (y_BE - y_hat_BE).detach())
        # torch does not annotate `backward`
        loss.backward()  # type: ignore[no-untyped-call]
        self.coder.project_gradient_()
        self.optimizers.step_()
        self.coder.normalise_()
        self.coder.follow_threshold_(code)
        self._count_fired_(code)
        residual_BD = None if code.residual_BD is None else code.residual_BD.detach()
        code = Code(code.idx_BK, code.val_BK.detach(), residual_BD)
        return StepResult(loss.detach(), batch_fvu(y_BE, y_hat_BE.detach()), code)

    def dead_M(self, dead_rows: int) -> Tensor:
        """Which latents did not fire in the last `dead_rows` rows."""
        return self.rows_since_fired_M >= dead_rows

    def dead_share(self, dead_rows: int) -> Tensor:
        """Share of latents that are dead; a tensor, so that nothing waits."""
        return self.dead_M(dead_rows).double().mean()

    def state_tensors(self) -> dict[str, Tensor]:
        """All that changes in training, by name: the live tensors, not copies."""
        return {
            "rows_since_fired_M": self.rows_since_fired_M,
            **{f"coder.{name}": tensor for name, tensor in self.coder.state_dict().items()},
            **{f"optimizer.{name}": t for name, t in self.optimizers.state_tensors().items()},
        }

    def load_state_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue bit for bit from what `state_tensors` gave."""
        self.rows_since_fired_M.copy_(tensors["rows_since_fired_M"])
        self.coder.load_state_dict(_under("coder.", tensors))
        self.optimizers.load_state_tensors_(_under("optimizer.", tensors))

    def _prediction_loss(self, code: Code, x_BD: Tensor, y_BE: Tensor, y_hat_BE: Tensor) -> Tensor:
        if self.coder.config.nested:
            return self._nested_loss(code, x_BD, y_BE)
        if not self.coder.config.per_step_loss:
            return reconstruction_loss(y_BE, y_hat_BE, self.total_variance)
        error_BE = y_BE - self.coder.decode_nothing(x_BD)
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
        weight = self.coder.config.input_loss
        if weight == 0:
            return 0.0
        assert code.residual_BD is not None
        assert self.input_variance is not None
        return weight * code.residual_BD.square().sum() / (len(code.idx_BK) * self.input_variance)

    def _auxiliary_loss(self, code: Code, x_BD: Tensor, error_BE: Tensor) -> Tensor | float:
        config = self.coder.config
        if config.auxk_alpha == 0:
            return 0.0
        predicted = self.coder.predict_error(code, x_BD, self.dead_M(config.dead_rows))
        if predicted is None:
            return 0.0
        error_hat_BE, scale = predicted
        loss = reconstruction_loss(error_BE, error_hat_BE, self.total_variance)
        return config.auxk_alpha * scale * loss

    @torch.no_grad()
    def _count_fired_(self, code: Code) -> None:
        # one place more, in front, for the -1 of unused entries: no entry has to be picked out
        fired = torch.zeros(self.coder.latents + 1, dtype=torch.bool, device=code.idx_BK.device)
        fired[code.idx_BK.flatten() + 1] = True
        self.rows_since_fired_M.add_(len(code.idx_BK)).masked_fill_(fired[1:], 0)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
