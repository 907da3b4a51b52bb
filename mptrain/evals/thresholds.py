"""The threshold of a batch- coder: on average over train rows, a row has K latents.

It is computed from the weights that are evaluated or saved, never followed during training, so
that neither the length of a training nor its optimizer matters to it.

B rows in a batch, D input width, K code entries a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mptrain.coders.coder import Coder, coder_from_tensors
from mptrain.config.sides import Sides
from mptrain.data.filters import Filters
from mptrain.data.loader import Batch

THRESHOLD_ROWS = 16_384  # train rows that decide, of those that the filters leave
MOST_ROWS_READ = 8 * THRESHOLD_ROWS  # in search of them


def coder_at_k(coder: Coder, k: int) -> Coder:
    """The same weights as a coder of another K; its threshold has yet to be set."""
    return coder_from_tensors(replace(coder.config, k=k), coder.state_dict())


@torch.no_grad()
def set_thresholds_(
    coders: Sequence[tuple[Coder, Sides]], batches: Iterable[Batch], filters: Filters
) -> None:
    """Set the threshold of each coder from the first `THRESHOLD_ROWS` rows that it takes.

    Each coder gets a new tensor for its threshold; the tensor that it had is not changed.
    """
    samples = [_Sample(coder, sides, filters) for coder, sides in coders]
    for batch in batches if samples else ():
        for sample in samples:
            sample.add_(batch)
        if all(sample.is_full for sample in samples):
            break
    for sample in samples:
        _set_threshold_(sample.coder, sample.threshold())


def _set_threshold_(coder: Coder, threshold: Tensor) -> None:
    assert coder.batch_threshold is not None
    coder.batch_threshold.threshold = threshold


class _Sample:
    """The strengths of the latents that one coder finds in train rows."""

    def __init__(self, coder: Coder, sides: Sides, filters: Filters) -> None:
        self.coder, self.sides, self.filters = coder, sides, filters
        self.rows = 0
        self.most = coder.config.required_k * THRESHOLD_ROWS  # weaker ones cannot decide
        _set_threshold_(coder, coder.b_D.new_zeros(()))  # no entry is dropped
        self.strengths = coder.b_D.new_zeros(0)

    @property
    def is_full(self) -> bool:
        return self.rows == THRESHOLD_ROWS

    def add_(self, batch: Batch) -> None:
        kept_B = self.filters.kept(batch, self.sides)
        x_BD = batch.values[self.sides[0]][kept_B][: THRESHOLD_ROWS - self.rows].float()
        if not len(x_BD):
            return
        self.rows += len(x_BD)
        code = self.coder.encode(x_BD)
        is_pursuit = self.coder.config.architecture.is_pursuit
        strengths = latent_strengths(code.idx_BK, code.val_BK, is_pursuit=is_pursuit)
        strengths = torch.cat([self.strengths, strengths[strengths > 0]])
        if len(strengths) > self.most:
            strengths = strengths.topk(self.most, sorted=False).values
        self.strengths = strengths

    def threshold(self) -> Float[Tensor, ""]:
        """The strength of the weakest latent that is kept; 0 where all of them are."""
        kept = self.coder.config.required_k * self.rows
        if not 0 < kept <= len(self.strengths):
            return self.strengths.new_zeros(())
        return self.strengths.topk(kept, sorted=False).values.min()


def latent_strengths(
    idx_BK: Int64[Tensor, "batch entries"],
    val_BK: Float[Tensor, "batch entries"],
    *,
    is_pursuit: bool,
) -> Float[Tensor, "batch entries"]:
    """The largest threshold at which each latent is still in its row; 0 for all other entries.

    A threshold ends a pursuit before its first smaller value, so that the running minimum decides;
    a latent that is chosen again counts once, at its first step.
    """
    if not is_pursuit:
        return val_BK.masked_fill(idx_BK < 0, 0)
    lowest_BK = val_BK.abs().cummin(1).values
    return lowest_BK.masked_fill(~first_entries(idx_BK), 0)


def first_entries(idx_BK: Int64[Tensor, "batch entries"]) -> Bool[Tensor, "batch entries"]:
    """Which entries are the first of their latent in their row; unused entries are not."""
    sorted_BK, order_BK = idx_BK.sort(dim=1, stable=True)
    is_first_BK = torch.ones_like(sorted_BK, dtype=torch.bool)
    is_first_BK[:, 1:] = sorted_BK[:, 1:] != sorted_BK[:, :-1]
    is_first_BK &= sorted_BK >= 0
    return torch.zeros_like(is_first_BK).scatter_(1, order_BK, is_first_BK)
