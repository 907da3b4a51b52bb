"""The encoder of JumpReLU coders (Rajamanoharan et al. 2024, arXiv 2407.14435).

B rows in a batch, D input width, E target width, M latents, K code entries a row.
"""

from typing import Any

import torch
from torch import Tensor

from mptrain.coders.code import Code
from mptrain.coders.encoders.base import LinearEncoder, LossTerms, zeros
from mptrain.coders.encoders.relu import sparse_code
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Codes
from mptrain.pursuit.batch_threshold import EntryThreshold


class JumpReluEncoder(LinearEncoder):
    """`z H(z - theta)` of `z = (x - b) encoder^T + bias`, with a learned threshold per latent.

    The penalty is the number of latents of a row. Thresholds learn by a straight-through estimator:
    `sec. 3`, with a rectangle of width `bandwidth` as the kernel. Here `theta = |threshold|`, which
    stays positive and scales with the rows.
    """

    has_sparsity_loss = True

    def __init__(self, config: CoderConfig, input_width: int) -> None:
        super().__init__(config, input_width)
        self.threshold_M = zeros(self.latents)

    def initialise_(self) -> None:
        self.threshold_M.fill_(self.config.bandwidth)

    def encode(
        self,
        x_BD: Tensor,
        b_D: Tensor,
        decoder_ME: Tensor,
        k: int,
        codes: Codes,
        threshold: EntryThreshold | None,
    ) -> Code:
        z_BM = (x_BD - b_D) @ self.encoder_MD.T + self.bias_M
        theta_M, bandwidth = self.threshold_M.abs(), self.config.bandwidth
        act_BM, is_active_BM = jump_relu(z_BM, theta_M, bandwidth)
        # the loss of a prediction moves the thresholds of latents just below them, too
        is_near_BM = _is_near(z_BM, theta_M, bandwidth) if act_BM.requires_grad else None
        return sparse_code(act_BM, is_near_BM)._replace(penalised_BM=is_active_BM)

    def sparsity_loss(self, code: Code, terms: LossTerms) -> Tensor:
        assert code.penalised_BM is not None
        return self.config.sparsity_weight * code.penalised_BM.sum(1).mean()


def jump_relu(z_BM: Tensor, theta_M: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """`z H(z - theta)` and `H(z - theta)`, with the pseudo-derivatives of eq. 11 and 12.

    In `theta`, they are `-theta / bandwidth` and `-1 / bandwidth` where `z` is within half a
    bandwidth of `theta`, else 0. In `z`, they are `H(z - theta)` and 0.
    """
    # torch does not annotate `apply`
    act_BM, is_active_BM = _JumpRelu.apply(z_BM, theta_M, bandwidth)  # type: ignore[no-untyped-call]
    return act_BM, is_active_BM


class _JumpRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_BM: Tensor, theta_M: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        is_active_BM = (z_BM > theta_M).to(z_BM.dtype)
        ctx.save_for_backward(z_BM, theta_M)
        ctx.bandwidth = bandwidth
        return z_BM * is_active_BM, is_active_BM

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dact_BM: Tensor, dactive_BM: Tensor) -> tuple[Tensor, Tensor, None]:
        z_BM, theta_M = ctx.saved_tensors
        is_near_BM = _is_near(z_BM, theta_M, ctx.bandwidth)
        dtheta_BM = -(theta_M * dact_BM + dactive_BM) * is_near_BM / ctx.bandwidth
        return dact_BM * (z_BM > theta_M), dtheta_BM.sum(0), None


def _is_near(z_BM: Tensor, theta_M: Tensor, bandwidth: float) -> Tensor:
    """Where the kernel is not 0."""
    is_near_BM: Tensor = (z_BM.detach() - theta_M.detach()).abs() < bandwidth / 2
    return is_near_BM


ENCODER = JumpReluEncoder
