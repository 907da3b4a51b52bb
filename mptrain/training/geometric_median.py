"""The geometric median: the point with the least sum of distances to all rows.

A few outliers hardly move it.

N rows, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mpcache.errors import UsageError

_MAX_STEPS, _TOLERANCE = 200, 1e-7


def geometric_median(x_ND: Float[Tensor, "rows width"]) -> Float[Tensor, " width"]:
    """Weiszfeld's iteration from the mean, until a step is at most 1e-7 of the mean distance.

    Raises:
        UsageError: there are no rows.
    """
    if not len(x_ND):
        raise UsageError(
            "start=median needs train rows, but the filters exclude all rows that were read for "
            "it; loosen the filters (such as --skip-tokens or --max-norm), or use start=mean"
        )
    median_D = x_ND.mean(0)
    for _ in range(_MAX_STEPS):
        distance_N: Tensor = torch.linalg.vector_norm(x_ND - median_D, dim=1)
        # a row at the point itself would weigh infinitely
        weight_N = 1 / distance_N.clamp_min(torch.finfo(x_ND.dtype).eps * distance_N.mean())
        if not weight_N.isfinite().all():
            return median_D  # all rows are the same
        before_D, median_D = median_D, weight_N @ x_ND / weight_N.sum()
        if (median_D - before_D).norm() <= _TOLERANCE * distance_N.mean():
            break
    return median_D
