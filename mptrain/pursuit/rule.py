"""What a pursuit step may choose, and which value it takes.

b rows of one micro-batch, D input width, M latents, S candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Select

N_RESCORED = 4  # best atoms by inexact scores that are scored again


class Rule(NamedTuple):
    """How each step chooses its latent `j` and its value `a`, from the scores `p_j = <w_j, r>`."""

    select: Select = "positive"
    "positive: largest p, a = max(0, p); signed: largest p, a = p; magnitude: largest |p|, a = p"
    tolerance: float = 0.0
    "a row stops where `||r|| <= tolerance ||x||`"
    shrink: float = 0.0
    "soft threshold that is taken off each value: a = max(0, p - shrink), for positive"
    block: int | None = None
    "step t chooses among `block` latents from `t block` on; None: among all"

    @classmethod
    def of(cls, config: CoderConfig, latents: int) -> "Rule":
        """The rule of an mp coder."""
        block = None if config.blocks == "none" else latents // config.required_k
        return cls(config.select, config.tolerance, config.shrink, block)

    @property
    def has_kernels(self) -> bool:
        """Whether the compiled back ends know this rule; otherwise steps run in plain torch."""
        return self.shrink == 0

    def first_latent(self, step: int) -> int:
        """The first latent that a step may choose."""
        return 0 if self.block is None else step * self.block

    def stop_norm(self, x_bD: Tensor) -> Tensor:
        """The norm of a residual at which each row stops."""
        norm_b: Tensor = torch.linalg.vector_norm(x_bD, dim=1)
        return self.tolerance * norm_b

    def best(self, score_bM: Tensor) -> Tensor:
        """The column that each row chooses; the first of equals."""
        return argmax(self._keys(score_bM))

    def candidates(self, score_bM: Tensor, size: int) -> Tensor:
        """The `size` columns that each row would choose first, ascending."""
        best_bS = self._keys(score_bM).topk(size, sorted=False).indices
        return best_bS.sort(1).values

    def value_(self, a_b: Tensor) -> Tensor:
        """The value to take where the chosen atom has the score `a`, in place."""
        if self.shrink > 0:
            a_b -= self.shrink
            # an atom that was chosen has the threshold as its correlation, but for rounding
            rounding = 1000 * torch.finfo(a_b.dtype).eps * self.shrink
            a_b.masked_fill_(a_b <= rounding, 0)
        return a_b.clamp_min_(0) if self.select == "positive" else a_b

    def _keys(self, score_bM: Tensor) -> Tensor:
        return score_bM.abs() if self.select == "magnitude" else score_bM


def argmax(score_bM: Tensor) -> Tensor:
    """First largest score of each row. NumPy's is 8 to 24 x faster than torch's on a CPU."""
    if score_bM.device.type == "cpu":
        return torch.from_numpy(score_bM.numpy().argmax(1))
    return score_bM.argmax(1)
