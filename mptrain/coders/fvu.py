"""How far predictions are from their targets: the loss to train on, the FVU to report.

B rows in a batch, E target width.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def reconstruction_loss(
    y_BE: Float[Tensor, "batch target"],
    y_hat_BE: Float[Tensor, "batch target"],
    total_variance: float,
) -> Float[Tensor, ""]:
    """Mean over the rows of `||y - y_hat||^2 / total_variance`.

    `total_variance` is the target's variance summed over its dimensions, one number for the whole
    training, so that the loss reads as a share of it; auxiliary terms are divided by it as well.
    """
    return (y_BE - y_hat_BE).square().sum() / (y_BE.shape[0] * total_variance)


def batch_fvu(
    y_BE: Float[Tensor, "batch target"], y_hat_BE: Float[Tensor, "batch target"]
) -> Float[Tensor, ""]:
    """FVU of one batch by its own mean, in its own dtype: for progress, never for evaluation."""
    return (y_BE - y_hat_BE).square().sum() / (y_BE - y_BE.mean(0)).square().sum()


class Fvu:
    """`sum ||y - y_hat||^2 / sum ||y - mean||^2` over all rows added, in one pass, in float64.

    The mean is per dimension over the rows added. Both moments are merged batch by batch (Chan et
    al. 1983), which stays exact where the mean is far larger than the deviation.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._mean_E: Tensor | None = None
        self._centred = self._error = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add_(
        self, y_BE: Float[Tensor, "batch target"], y_hat_BE: Float[Tensor, "batch target"]
    ) -> None:
        """Count these rows in. Waits for no device."""
        y_BE, rows = y_BE.double(), y_BE.shape[0]
        if not rows:
            return
        mean_E = y_BE.mean(0)
        if self._mean_E is None:
            self._mean_E = torch.zeros_like(mean_E)
        shift_E, total = mean_E - self._mean_E, self.rows + rows
        between = shift_E.square().sum() * (self.rows * rows / total)
        self._centred = self._centred.to(y_BE.device) + (y_BE - mean_E).square().sum() + between
        self._error = self._error.to(y_BE.device) + (y_BE - y_hat_BE).square().sum()
        self._mean_E = self._mean_E + shift_E * (rows / total)
        self.rows = total

    @property
    def value(self) -> float:
        """FVU so far; NaN without rows, or where target and error do not vary at all."""
        return float(self._error / self._centred)
