"""Loss, FVU and L0 of the batch of one train step.

B rows in a batch, E target width; lower-case b: rows of one micro-batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mptrain.coders.code import Code
from mptrain.kernels.sparse import active_latents
from mptrain.training.distributed import ProcessGroup


class StepResult(NamedTuple):
    """The batch of a train step, as the coder did before the update.

    Reading a tensor waits for the device.
    """

    loss: Tensor
    "reconstruction and auxiliary loss; if not finite, the parameters must not be saved"
    fvu: Tensor
    "fraction of variance unexplained, by the mean of this batch"
    l0: Tensor
    "mean number of distinct latents with a non-zero value"
    codes: list[Code]
    "of the micro-batches of this process, without gradients and residuals"


class BatchStatistics:
    """Sums over the micro-batches of a batch, and over the processes that divide its rows."""

    def __init__(self, y_BE: Tensor, rows: int, processes: ProcessGroup) -> None:
        """`y_BE` are the targets of this process, `rows` counts the rows of all processes."""
        self.codes: list[Code] = []
        self._y_BE, self._rows, self._processes = y_BE, rows, processes
        # float32 cannot count all active latents
        self._squared_error, self._loss, self._active = y_BE.new_zeros(
            3, dtype=torch.float64
        ).unbind()

    def add(self, loss: Tensor, y_bE: Tensor, y_hat_bE: Tensor, code: Code) -> None:
        """Add a micro-batch, with its share of the loss."""
        self._squared_error += (y_bE - y_hat_bE).square().sum()
        self._loss += loss
        self.codes.append(code)

    def result(self) -> StepResult:
        """Return the statistics of the whole batch."""
        y_BE, processes = self._y_BE, self._processes
        mean_E = processes.all_reduce_(y_BE.sum(0)) / self._rows
        for code in self.codes:
            self._active += active_latents(code.idx_BK, code.val_BK).sum()
        variation = (y_BE - mean_E).square().sum().double()
        sums = torch.stack([variation, self._squared_error, self._loss, self._active])
        variation, squared_error, loss, active = processes.all_reduce_(sums).unbind()
        fvu = squared_error.to(y_BE.dtype) / variation.to(y_BE.dtype)
        return StepResult(loss.to(y_BE.dtype), fvu, active / self._rows, self.codes)
