"""The rows of a store for all trainers alike, the time of a trainer, and what it reaches.

B rows in a batch, D input width, E target width, M latents.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.trainer_settings import Setting, fit_config
from mptrain.coders.fvu import Fvu
from mptrain.config.sides import Side
from mptrain.data.batches import release_after_use
from mptrain.data.filters import make_filters
from mptrain.data.loader import Batch, Loader, Split, Store
from mptrain.training.setup import make_loader, train_steps

Rows = tuple[Float[Tensor, "batch input"], Float[Tensor, "batch target"]]
CodeRows = Callable[[Tensor], tuple[Float[Tensor, "batch target"], Bool[Tensor, "batch latents"]]]


@dataclass(frozen=True, kw_only=True)
class TrainedCoder:
    """A coder after its training, as its tool saves and loads it."""

    code: CodeRows
    "the predictions of rows, and which latents are active in each row"
    latents: int
    train_seconds: float
    "in train steps, without waiting for rows"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Figures of a coder on held-out rows."""

    fvu: float
    "on the half of the parts that chooses"
    report_fvu: float
    "on the other half"
    l0: float
    "on both halves; the share of dead latents too"
    dead_share: float


class TimedBatches:
    """Batches, and the time that a trainer spends between one batch and the next."""

    def __init__(self, batches: Iterator[Rows]) -> None:
        self.seconds = 0.0
        self._batches = batches
        self._started: float | None = None

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> Rows:
        self.stop()
        batch = next(self._batches)
        self._started = time.perf_counter()
        return batch

    def stop(self) -> None:
        """End the time of the last step."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
        self._started = None


class StoreRows:
    """The train rows of a setting, in the order and with the filters of our own runs, and the
    held-out rows.
    """

    def __init__(self, setting: Setting, store: Store) -> None:
        self.config = fit_config(setting, "", "")
        self._store = store
        (coder,) = self.config.coders()
        self.sides: tuple[Side, Side] = coder.sides
        self._filters = make_filters(self.config, store, self.sides)

    @property
    def widths(self) -> tuple[int, int]:
        """Of the input and of the target."""
        source, target = (self._store.width(*side) for side in self.sides)
        return source, target

    def batches(self) -> Iterator[Rows]:
        """Yield input and target rows in float32, a batch for each train step."""
        with self._loader(self._store, "train") as loader:
            batches = release_after_use(loader.batches())
            for _, batch in zip(range(train_steps(self.config)), batches, strict=False):
                yield self._filtered(batch)

    def count(self) -> int:
        """Train rows that the filters keep, found by reading all batches."""
        return sum(len(x_BD) for x_BD, _ in self.batches())

    def evaluate(self, coder: TrainedCoder) -> HeldOut:
        """Code the held-out rows: every second part chooses, the others report."""
        numbers = [part.number for part in self._store.parts(self.sides, "validation")]
        fired_M = torch.zeros(coder.latents, dtype=torch.bool)
        active, fvus = 0, [Fvu(), Fvu()]
        for fvu, parts in zip(fvus, (numbers[0::2], numbers[1::2]), strict=True):
            for x_BD, y_BE in self._held_out(parts):
                y_hat_BE, active_BM = coder.code(x_BD)
                fvu.add_(y_BE, y_hat_BE)
                active += int(active_BM.sum())
                fired_M |= active_BM.any(dim=0)
        rows = sum(fvu.rows for fvu in fvus)
        return HeldOut(
            fvu=fvus[0].value,
            report_fvu=fvus[1].value,
            l0=active / rows,
            dead_share=float(1 - fired_M.double().mean()),
        )

    def _held_out(self, parts: Sequence[int]) -> Iterator[Rows]:
        with self._loader(self._store.limited_to(parts), "validation") as loader:
            yield from map(self._filtered, release_after_use(loader.one_pass()))

    def _loader(self, store: Store, split: Split) -> Loader:
        device = torch.device("cpu")
        return make_loader(
            self.config, store, self.sides, split, filters=self._filters, device=device
        )

    def _filtered(self, batch: Batch) -> Rows:
        source, target = self.sides
        kept_B = self._filters.kept(batch, self.sides)
        x_BD = batch.values[source][kept_B].float()
        return x_BD, x_BD if source == target else batch.values[target][kept_B].float()
