"""One threshold over a batch instead of one number of steps a row: batch matching pursuit.

B rows in a batch, D input width, M latents, K pursuit steps.
"""

from typing import NamedTuple

from torch import Tensor

from mptrain.kernels.sparse import strongest, weighted_rows


class EntryThreshold(NamedTuple):
    """Which entries of a batch's codes are kept: those whose values are large enough."""

    mean_entries: int | None
    "keep the strongest entries, this many a row on average; None: `value` decides"
    value: Tensor
    "the smallest value that is kept, where `mean_entries` is None"


def drop_weak_steps_(
    idx_BK: Tensor, val_BK: Tensor, residual_BD: Tensor, U_MD: Tensor, threshold: EntryThreshold
) -> None:
    """Undo each row's steps from its first value (of either sign) below the threshold on.

    Values mostly fall along a pursuit, but not always: the running minimum makes what is kept a
    prefix, so that the code is that of a pursuit with fewer steps.
    """
    lowest_BK = val_BK.abs().cummin(1).values
    least = threshold.value
    if threshold.mean_entries is not None:
        least = strongest(lowest_BK, threshold.mean_entries)
    dropped_BK = lowest_BK < least
    residual_BD += weighted_rows(idx_BK, val_BK * dropped_BK, U_MD)
    idx_BK.masked_fill_(dropped_BK, -1)
    val_BK.masked_fill_(dropped_BK, 0)
