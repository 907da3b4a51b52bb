"""The threshold of coders that keep K latents a row on average, with any encoder."""

import torch
from torch import Tensor, nn

from mptrain.pursuit.batch_threshold import EntryThreshold


class BatchThreshold(nn.Module):
    """A threshold beside an encoder: of some more entries a row, the strong ones are kept.

    In training the strongest of a batch are kept. For inference `mptrain.evals.thresholds`
    computes `threshold` from train rows; 0 drops no entry.
    """

    threshold: Tensor

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries = entries
        self.register_buffer("threshold", torch.zeros(()))

    def widen(self, k: int, over_batch: bool) -> tuple[int, EntryThreshold]:
        """The entries to compute in each row, and which of them to keep, for `k` on average."""
        return self.entries * k, EntryThreshold(k if over_batch else None, self.threshold)
