"""Evaluate coders on held-out rows, several in one pass; nothing of a coder changes.

B rows in a batch, D input width, E target width, M latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mptrain.checkpoint import load_coder
from mptrain.coder import Coder
from mptrain.config import CoderConfig
from mptrain.loader import Batch, Loader, Side, kept_rows, open_store
from mptrain.loss import Fvu
from mptrain.sparse import active_latents

_BATCH_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a coder does on a set of rows."""

    k: int
    rows: int
    "rows evaluated, without those left out"
    fvu: float
    "fraction of variance unexplained, over all rows evaluated together"
    fvu_all: float
    "the same with the rows of first positions, which training leaves out"
    l0: float
    "mean number of distinct latents with a non-zero value"
    dead_share: float
    "share of latents that fired in none of these rows"


def sides_of(config: CoderConfig) -> tuple[Side, Side]:
    """Input and target of a coder: an SAE codes the output from itself."""
    target = (config.hookpoint, "output")
    return (target if config.kind == "sae" else (config.hookpoint, "input")), target


def evaluate(
    coders: Sequence[tuple[Coder, int]],
    batches: Iterable[Batch],
    *,
    skip_positions: int,
    finite_only: bool = False,
) -> list[Evaluation]:
    """Evaluate pairs of coder and K on the same batches."""
    tallies = [_Tally(coder, k, skip_positions, finite_only) for coder, k in coders]
    for batch in batches:
        for tally in tallies:
            tally.add_(batch)
    return [tally.evaluation() for tally in tallies]


def evaluate_coder(
    folder: Path, store_path: Path, other_k: Sequence[int], rows: int | None = None
) -> list[Evaluation]:
    """Evaluate a saved coder on held-out rows, at its own K and at others.

    Filters are those it was trained with. Raises ValueError for what is no coder or no store.
    """
    coder, trained = load_coder(folder)
    sides = tuple(dict.fromkeys(sides_of(coder.config)))
    with Loader(
        open_store(store_path), sides, "validation", batch_rows=_BATCH_ROWS, seed=0,
        device=coder.b_D.device,
    ) as loader:  # fmt: skip
        return evaluate(
            [(coder, k) for k in dict.fromkeys([coder.config.k, *other_k])],
            loader.one_pass(rows),
            skip_positions=trained["skip_positions"],
            finite_only=trained["allow_nonfinite"],
        )


class _Tally:
    """Running sums of one coder at one K."""

    def __init__(self, coder: Coder, k: int, skip_positions: int, finite_only: bool) -> None:
        self.coder, self.k, self.skip = coder, k, skip_positions
        self.input, self.target = sides_of(coder.config)
        self.finite = (self.input, self.target) if finite_only else ()
        self.kept, self.all = Fvu(), Fvu()
        self.active = 0.0
        self.fired_M = torch.zeros(coder.latents + 1, dtype=torch.bool, device=coder.b_D.device)

    @torch.no_grad()
    def add_(self, batch: Batch) -> None:
        usable_B = kept_rows(batch, skip_positions=0, finite=self.finite)
        kept_B = kept_rows(batch, skip_positions=self.skip)[usable_B]
        x_BD, y_BE = batch.values[self.input][usable_B], batch.values[self.target][usable_B]
        code = self.coder.encode(x_BD, self.k)
        y_hat_BE = self.coder.predict(code, x_BD)
        self.all.add_(y_BE, y_hat_BE)
        self._add_kept_(y_BE[kept_B], y_hat_BE[kept_B], code.idx_BK[kept_B], code.val_BK[kept_B])

    def _add_kept_(
        self,
        y_BE: Float[Tensor, "batch target"],
        y_hat_BE: Float[Tensor, "batch target"],
        idx_BK: Tensor,
        val_BK: Tensor,
    ) -> None:
        if not len(y_BE):
            return
        self.kept.add_(y_BE, y_hat_BE)
        self.active += float(active_latents(idx_BK, val_BK).double().sum())
        self.fired_M[idx_BK.flatten() + 1] = True  # place 0 takes the -1 of unused entries

    def evaluation(self) -> Evaluation:
        return Evaluation(
            k=self.k,
            rows=self.kept.rows,
            fvu=self.kept.value,
            fvu_all=self.all.value,
            l0=self.active / max(1, self.kept.rows),
            dead_share=float(1 - self.fired_M[1:].double().mean()),
        )
