"""One threshold over a batch instead of one number of steps a row: batch matching pursuit.

B rows in a batch, D input width, M latents, K pursuit steps.
"""

from typing import NamedTuple

from torch import Tensor

from mptrain.kernels.sparse import strongest, weighted_rows


class Cut(NamedTuple):
    """Where each row's pursuit ends: before its first value (of either sign) below a threshold."""

    mean_steps: int | None
    "steps that are kept on average over the batch, whose strongest decide; None: `threshold` does"
    threshold: Tensor
    "the smallest value that is kept, where `mean_steps` is None"


def cut_(idx_BK: Tensor, val_BK: Tensor, residual_BD: Tensor, U_MD: Tensor, cut: Cut) -> None:
    """Take back every step from the one at which a row's smallest value yet is below the threshold.

    Values mostly fall along a pursuit, but not always: the running minimum makes what is kept a
    prefix, so that the code is that of a pursuit with fewer steps.
    """
    lowest_BK = val_BK.abs().cummin(1).values
    threshold = cut.threshold
    if cut.mean_steps is not None:
        threshold = strongest(lowest_BK, cut.mean_steps)
    dropped_BK = lowest_BK < threshold
    residual_BD += weighted_rows(idx_BK, val_BK * dropped_BK, U_MD)
    idx_BK.masked_fill_(dropped_BK, -1)
    val_BK.masked_fill_(dropped_BK, 0)
