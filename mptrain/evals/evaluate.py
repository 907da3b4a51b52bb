"""Evaluate coders on held-out rows, several in one pass; nothing of a coder changes.

B rows in a batch, D input width, E target width, M latents.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mpcache.errors import UsageError
from mptrain.coders.checkpoint import load_coder
from mptrain.coders.coder import Coder, check_codes, check_k
from mptrain.coders.fvu import Fvu
from mptrain.config.checks import check_cache_limit
from mptrain.config.coder_settings import Codes
from mptrain.config.sides import Side
from mptrain.data.batches import release_after_use
from mptrain.data.filters import Filters, filters_from_json
from mptrain.data.loader import Batch, Loader, Split, Store, open_store
from mptrain.evals.thresholds import MOST_ROWS_READ, coder_at_k, set_thresholds_
from mptrain.kernels.device import resolve_device
from mptrain.kernels.sparse import active_latents

_BATCH_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a coder does on a set of rows, all rows taken together (not a mean over batches)."""

    k: int | None
    "latents of a row that the coder was run with; None: its architecture has no K"
    codes: Codes | None
    "how the values of a pursuit were computed; None: the coder has an encoder"
    rows: int
    "rows that the filters keep, which all figures but fvu_all are of"
    fvu: float
    "fraction of variance unexplained: `sum |y - y_hat|^2 / sum |y - mean|^2`"
    fvu_all: float
    "FVU over all rows, including those that the filters exclude from training"
    l0: float
    "mean number of distinct latents with a non-zero value"
    l0_deviation: float | None
    "l0 / k - 1; None without K"
    dead_share: float
    "share of latents that fired in none of these rows"

    @property
    def is_finite(self) -> bool:
        """Whether all figures are numbers; if not, the coder diverged, or there were no rows."""
        return all(math.isfinite(v) for v in asdict(self).values() if isinstance(v, float))


def evaluate(
    coders: Sequence[tuple[Coder, int | None, Codes]],
    batches: Iterable[Batch],
    filters: Filters,
) -> list[Evaluation]:
    """Evaluate coders, each with its K and codes, on the same batches."""
    tallies = [_Tally(coder, k, codes, filters) for coder, k, codes in coders]
    for batch in batches if tallies else ():
        for tally in tallies:
            tally.add_(batch)
    return [tally.evaluation() for tally in tallies]


def evaluate_coder(
    folder: str | Path,
    store_path: str | Path,
    other_k: Sequence[int] = (),
    rows: int | None = None,
    device: str = "auto",
    other_codes: Sequence[Codes] = (),
    parts: Collection[int] | None = None,
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
) -> list[Evaluation]:
    """Evaluate a saved coder on a store's validation rows.

    The rows are filtered as they were in training. At another K, a batch- coder gets a threshold
    from the store's train rows, as it got one for its own K at the end of its training.

    Args:
        folder: folder of the coder, `RUN/coders/NAME`.
        store_path: path or URL of the store. Its fingerprint must be that of the store that the
            coder was trained on: in another store, train rows may be among the validation rows.
        other_k: evaluate also with these K.
        rows: validation rows to evaluate on, all if None.
        device: torch device; `auto` is the first GPU, or the CPU.
        other_codes: evaluate an mp coder also with values by these codes.
        parts: numbers of the store's parts to read, all if None.
        cache_dir: local folder that keeps what is read from a remote store.
        cache_bytes: maximum number of bytes in `cache_dir`.

    Returns:
        An evaluation for the coder's own K and codes, then one for each other K and codes.

    Raises:
        UsageError: there is no such coder or store, the store is not the coder's, or the coder
            cannot be run with a K or with codes.
        DamagedStoreError: the store's bytes are not what was committed.

    Example:
        >>> from pathlib import Path
        >>> from mptrain import evaluate_coder
        >>> (folder,) = Path("run/coders").iterdir()
        >>> own, other = evaluate_coder(folder, "store", other_k=(1,))
        >>> own.k, other.k, own.fvu < other.fvu
        (3, 1, True)
    """
    if rows is not None and rows < 1:
        raise UsageError(f"rows must be at least 1, got {rows}")
    check_cache_limit(cache_dir, cache_bytes)
    torch_device = resolve_device(device)
    coder, trained = load_coder(Path(folder))
    store = open_store(store_path, cache_dir, cache_bytes)
    if parts is not None:
        store = store.limited_to(parts)
    _refuse_other_rows(coder, trained, store)
    sides = tuple(dict.fromkeys(coder.config.sides))
    ks = dict.fromkeys([coder.config.k, *(check_k(coder, k) for k in other_k)])
    codes = [check_codes(coder, c) for c in dict.fromkeys([coder.config.codes, *other_codes])]
    coder.to(torch_device)
    filters = filters_from_json(trained)
    others = {
        k: coder_at_k(coder, k)
        for k in ks
        if k is not None and k != coder.config.k and coder.config.architecture.has_threshold
    }
    if others:
        with _loader(store, sides, "train", filters, torch_device) as loader:
            calibrate_thresholds_(list(others.values()), loader, filters)
    of_k = dict.fromkeys(ks, coder) | others
    with _loader(store, sides, "validation", filters, torch_device) as loader:
        coders = [(of_k[k], k, c) for c in codes for k in ks]
        return evaluate(coders, release_after_use(loader.one_pass(rows)), filters)


def calibrate_thresholds_(coders: Sequence[Coder], loader: Loader, filters: Filters) -> None:
    """Set the thresholds of coders that have a threshold, from a loader's rows."""
    with_sides = [
        (coder, coder.config.sides) for coder in coders if coder.config.architecture.has_threshold
    ]
    if with_sides:
        set_thresholds_(with_sides, release_after_use(loader.one_pass(MOST_ROWS_READ)), filters)


def _loader(
    store: Store, sides: Sequence[Side], split: Split, filters: Filters, device: torch.device
) -> Loader:
    return Loader(
        store,
        sides,
        split,
        batch_rows=_BATCH_ROWS,
        seed=0,
        device=device,
        row_fields=filters.row_fields,
    )


def _refuse_other_rows(coder: Coder, trained: Mapping[str, Any], store: Store) -> None:
    own = (len(coder.b_D), len(coder.output_bias_E))
    for name, width, side in zip(("input", "target"), own, coder.config.sides, strict=True):
        if width != store.width(*side):
            raise UsageError(
                f"the coder's {name} has width {width}, but {':'.join(side)} of {store.storage} "
                "has "
                f"width {store.width(*side)}; evaluate on the store that trained the coder"
            )
    if trained["store_fingerprint"] != store.fingerprint:
        raise UsageError(
            f"{store.storage} has fingerprint {store.fingerprint}, but the coder was trained on a "
            f"store with fingerprint {trained['store_fingerprint']}; give that store or a copy "
            "of it"
        )


class _Tally:
    """Running sums of one coder at one K."""

    def __init__(self, coder: Coder, k: int | None, codes: Codes, filters: Filters) -> None:
        self.coder, self.k, self.codes, self.filters = coder, k, codes, filters
        self.input, self.target = coder.config.sides
        self.kept, self.all = Fvu(), Fvu()
        self.active = 0.0
        self.fired_M = torch.zeros(coder.latents + 1, dtype=torch.bool, device=coder.b_D.device)

    @torch.no_grad()
    def add_(self, batch: Batch) -> None:
        sides = (self.input, self.target)
        usable_B = self.filters.usable(batch, sides)
        kept_B = self.filters.kept(batch, sides)[usable_B]
        x_BD, y_BE = (batch.values[side][usable_B].float() for side in sides)
        # apart, as only those that are kept are counted
        self._add_(x_BD[kept_B], y_BE[kept_B], is_kept=True)
        self._add_(x_BD[~kept_B], y_BE[~kept_B], is_kept=False)

    def _add_(
        self, x_BD: Float[Tensor, "batch input"], y_BE: Float[Tensor, "batch target"], is_kept: bool
    ) -> None:
        if not len(x_BD):
            return
        code = self.coder.encode(x_BD, self.k, codes=self.codes)
        y_hat_BE = self.coder.predict(code, x_BD)
        self.all.add_(y_BE, y_hat_BE)
        if not is_kept:
            return
        self.kept.add_(y_BE, y_hat_BE)
        self.active += float(active_latents(code.idx_BK, code.val_BK).double().sum())
        self.fired_M[code.idx_BK.flatten() + 1] = True  # entry 0 takes the -1 of unused entries

    def evaluation(self) -> Evaluation:
        l0 = self.active / max(1, self.kept.rows)
        return Evaluation(
            k=self.k,
            codes=self.codes if self.coder.config.architecture.is_pursuit else None,
            rows=self.kept.rows,
            fvu=self.kept.value,
            fvu_all=self.all.value,
            l0=l0,
            l0_deviation=None if self.k is None else l0 / self.k - 1,
            dead_share=float(1 - self.fired_M[1:].double().mean()),
        )
