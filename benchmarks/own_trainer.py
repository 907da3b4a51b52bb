"""Our trainer, as `mptrain fit` trains one coder.

B rows in a batch.
"""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.trainer_rows import StoreRows, TrainedCoder
from benchmarks.trainer_settings import Setting, fit_config
from mptrain.coders.checkpoint import load_coder
from mptrain.runs.fit import fit


def train(setting: Setting, rows: StoreRows, store: Path, work: Path) -> TrainedCoder | None:
    """Train in the folder `work`; None if the coder diverged."""
    (result,) = fit(fit_config(setting, store, work / "run"))
    if result.diverged:
        return None
    coder, _ = load_coder(work / "run" / "coders" / result.coder)

    @torch.no_grad()
    def code_rows(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        code = coder.encode(x_BD)
        used_BK = code.idx_BK.masked_fill(code.val_BK == 0, -1) + 1
        active_BM = torch.zeros(len(x_BD), coder.latents + 1, dtype=torch.bool)
        active_BM.scatter_(1, used_BK, True)
        return coder.predict(code, x_BD), active_BM[:, 1:]  # column 0 has the unused entries

    return TrainedCoder(code=code_rows, latents=coder.latents, train_seconds=result.train_seconds)
