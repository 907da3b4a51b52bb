"""Statistics of a sample of train rows, from which coders start.

N rows, D input width, E target width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mptrain.config.sides import Sides
from mptrain.data.filters import Filters
from mptrain.data.loader import Loader, Store
from mptrain.training.geometric_median import geometric_median

SAMPLE_ROWS = 16_384


class TrainSample:
    """Statistics of filtered train rows, of `SAMPLE_ROWS` rows that are read.

    All coders of the same sides share the statistics, so that the store is not read for each. They
    do not depend on the other coders of a run.
    """

    def __init__(self, filters: Filters, store: Store) -> None:
        self._filters, self._store = filters, store
        self._variances: dict[Sides, tuple[float, float]] = {}
        self._medians: dict[Sides, tuple[Tensor, Tensor]] = {}

    def variances(self, sides: Sides) -> tuple[float, float]:
        """The mean variance of a dimension, of input and target; 0 without rows."""
        if sides not in self._variances:
            x_ND, y_NE = self._rows(sides)
            self._variances[sides] = _variance(x_ND), _variance(y_NE)
        return self._variances[sides]

    def medians(self, sides: Sides) -> tuple[Float[Tensor, " input"], Float[Tensor, " target"]]:
        """The geometric medians of input and target."""
        if sides not in self._medians:
            x_ND, y_NE = self._rows(sides)
            self._medians[sides] = geometric_median(x_ND), geometric_median(y_NE)
        return self._medians[sides]

    def _rows(self, sides: Sides) -> tuple[Tensor, Tensor]:
        filters = self._filters.of(sides)
        cpu = torch.device("cpu")  # the same start on every device
        with Loader(
            self._store,
            sides,
            "train",
            batch_rows=SAMPLE_ROWS,
            seed=0,
            device=cpu,
            row_fields=filters.row_fields,
        ) as loader:
            batch = next(loader.one_pass(SAMPLE_ROWS))
        kept_N = filters.kept(batch, sides)
        x_ND, y_NE = (batch.values[side][kept_N].float() for side in sides)
        return x_ND, y_NE


def _variance(x_ND: Float[Tensor, "rows width"]) -> float:
    return float(x_ND.var(dim=0, correction=0).mean(dtype=torch.float64)) if len(x_ND) else 0.0
