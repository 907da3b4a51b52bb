"""For how many rows each latent has not fired: M latents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mptrain.coders.code import Code
from mptrain.training.distributed import ProcessGroup


class LatentUsage:
    """Counters of the latents of one coder. A latent fires where a code has an entry of it."""

    def __init__(self, latents: int, device: torch.device) -> None:
        self.rows_since_fired_M = torch.zeros(latents, dtype=torch.int64, device=device)
        "train rows since the last batch in which the latent fired"

    def dead_M(self, dead_rows: int) -> Tensor:
        """Return which latents did not fire in the last `dead_rows` rows."""
        return self.rows_since_fired_M >= dead_rows

    def dead_share(self, dead_rows: int) -> Tensor:
        """Return the share of dead latents; a tensor, so that nothing waits for the device."""
        return self.dead_M(dead_rows).double().mean()

    @torch.no_grad()
    def update_(self, codes: Sequence[Code], rows: int, processes: ProcessGroup) -> None:
        """Count a batch of `rows` rows; `codes` are those of its micro-batches in this process."""
        # one element more, in front, takes the -1 of unused entries: no entry has to be picked out
        fired = self.rows_since_fired_M.new_zeros(len(self.rows_since_fired_M) + 1)
        for code in codes:
            fired[code.idx_BK.flatten() + 1] = 1
        has_fired_M = processes.all_reduce_(fired)[1:] > 0
        self.rows_since_fired_M.add_(rows).masked_fill_(has_fired_M, 0)
