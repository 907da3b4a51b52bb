"""What a store holds: progress and provenance (`info`), statistics of its rows (`stats`).

Statistics come from the norms and moments that were stored with each part, in the order of parts:
the same whoever reads them. Memory, for each part in work at a time: its norms, part_rows x 12
bytes, and a histogram of 0.5 MB; for each side three float64 numbers a dimension.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map
from mpcache.storage.base import Storage
from mpcache.store.format import TOKENS, acts_array, array_specs, hookpoint_of
from mpcache.store.moments import Moments, empty_moments, merge_moments
from mpcache.store.reader import Store, open_store
from mpcache.store.rows_wanted import extent_of

_OUTLIER = 10.0  # a dimension's root mean square over the median dimension's
_NORM_BINS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SideStats:
    """Statistics of one side of a hookpoint over all its finite committed rows."""

    hookpoint: str
    side: str
    rows: int
    width: int
    mean_norm: float
    "Euclidean norm of the mean row"
    variance: float
    "variance summed over dimensions"
    norm_median: float | None
    "of rows with a finite norm; None: there are none"
    norm_99: float | None
    norm_largest: float | None
    largest: float
    "largest finite magnitude of a value"
    outlier_dimensions: tuple[int, ...]
    "dimensions whose root mean square is over 10 times the median dimension's"
    nonfinite: int


def info(where: str | Path | Storage) -> dict[str, Any]:
    """Provenance, rows wanted, and rows, bytes and parts done of each array, as plain values."""
    store = open_store(where)
    planned, extent = set(store.part_numbers(TOKENS)), extent_of(store)
    return {
        "store": str(store.storage),
        "fingerprint": store.fingerprint,
        "identity": store.identity,
        "provenance": store.provenance,
        "dtype": store.layout.dtype,
        "codec": store.layout.codec,
        "part_rows": store.part_rows,
        "chunk_rows": store.chunk_rows,
        "parts_planned": len(planned),
        "rows_planned": _rows(store, TOKENS),
        "empty_documents": store.tokens.empty_documents(),
        "rows_wanted": extent.rows_wanted,
        "exhausted": extent.exhausted,
        "shortfall": extent.shortfall,
        "hookpoints": [_side_info(store, h, s) for h in store.hookpoints for s in store.sides(h)],
    }


def _side_info(store: Store, hookpoint: str, side: str) -> dict[str, Any]:
    array = acts_array(hookpoint, side)
    marks = store.marks(array)
    return {
        "hookpoint": hookpoint,
        "side": side,
        "width": store.width(hookpoint, side),
        "parts": len(marks),
        "rows": _rows(store, array),
        "rows_validation": sum(m.rows for m in marks if m.split == "validation"),
        "bytes": sum(m.stored_bytes for m in marks),
        "nonfinite": store.acts.nonfinite(hookpoint, side),
    }


def _rows(store: Store, array: str) -> int:
    return sum(mark.rows for mark in store.marks(array))


# --- statistics of rows ---


@dataclass(frozen=True, eq=False)
class SideRows:
    """Statistics of one side of a hookpoint, and its moments dimension by dimension."""

    stats: SideStats
    moments: Moments


def stats(
    where: str | Path | Storage,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
) -> tuple[SideRows, ...]:
    """Statistics of every collected side over all its parts."""
    store = open_store(where)
    arrays = [acts_array(h, s) for h in store.hookpoints for s in store.sides(h)]
    marks = [(part, array) for array in arrays for part in store.part_numbers(array)]
    found = ordered_map(functools.partial(_part_rows, store), marks, parallel, quiet=quiet)
    with tqdm(found, "stats", len(marks), unit="mark", disable=quiet) as bar:
        parts = iter(bar)
        return tuple(_side_rows(store, a, _next(parts, len(store.part_numbers(a)))) for a in arrays)


def save_dimensions(sides: Iterable[SideRows], path: Path) -> None:
    """Write mean and variance per dimension, and the rows they are of, to a safetensors file."""
    tensors = {}
    for one in sides:
        name = f"{one.stats.hookpoint}/{one.stats.side}"
        tensors[f"{name}/mean"] = one.moments.mean_W
        tensors[f"{name}/variance"] = one.moments.variance_W
        tensors[f"{name}/finite_rows"] = torch.tensor(one.moments.rows)
    save_file(tensors, path)


@dataclass(frozen=True, eq=False)
class _PartRows:
    """What one part adds."""

    rows: int
    moments: Moments
    norm_counts: np.ndarray
    largest: float
    nonfinite: int


def _next(parts: Iterator[_PartRows], count: int) -> Iterator[_PartRows]:
    return (next(parts) for _ in range(count))


def _part_rows(store: Store, task: tuple[int, str]) -> _PartRows:
    part, array = task
    mark = store.mark(part, array)
    assert mark.statistics is not None, array
    _, norms, _ = array_specs(array, store.layout, mark.width)
    norms_R = store.reader.read_object(array, norms, part, 0, mark.rows)
    return _PartRows(
        rows=mark.rows,
        moments=store.acts.part_moments(array, part),
        norm_counts=_norm_counts(norms_R),
        largest=mark.statistics.largest,
        nonfinite=mark.nonfinite,
    )


def _side_rows(store: Store, array: str, parts: Iterable[_PartRows]) -> SideRows:
    hookpoint, side = hookpoint_of(array)
    moments = empty_moments(store.width(hookpoint, side))
    counts = np.zeros(_NORM_BINS, np.int64)
    rows, largest, nonfinite = 0, 0.0, 0
    for one in parts:
        moments = merge_moments([moments, one.moments])
        counts += one.norm_counts
        rows, nonfinite = rows + one.rows, nonfinite + one.nonfinite
        largest = max(largest, one.largest)
    median, high, largest_norm = _quantiles(counts, (0.5, 0.99, 1.0))
    told = SideStats(
        hookpoint=hookpoint,
        side=side,
        rows=rows,
        width=len(moments.mean_W),
        mean_norm=float(moments.mean_W.norm()),
        variance=float(moments.variance_W.sum()),
        norm_median=median,
        norm_99=high,
        norm_largest=largest_norm,
        largest=largest,
        outlier_dimensions=_outliers(moments.mean_W, moments.variance_W),
        nonfinite=nonfinite,
    )
    return SideRows(told, moments)


def _outliers(mean_W: Tensor, variance_W: Tensor) -> tuple[int, ...]:
    rms_W = (variance_W + mean_W.square()).sqrt()
    return tuple(torch.nonzero(rms_W > _OUTLIER * rms_W.median()).flatten().tolist())


def _norm_counts(norms_R: np.ndarray) -> np.ndarray:
    """How many finite norms have which upper 16 bits: bins of equal relative width, 1 in 128."""
    bins = norms_R[np.isfinite(norms_R)].view(np.uint32) >> 16
    return np.bincount(bins, minlength=_NORM_BINS)


def _quantiles(counts: np.ndarray, shares: tuple[float, ...]) -> tuple[float | None, ...]:
    """Quantiles of the norms that were counted, rounded down to their bins; None if none was."""
    below = np.cumsum(counts)
    if not below[-1]:
        return (None,) * len(shares)
    found = np.searchsorted(below, [max(1, share * below[-1]) for share in shares])
    return tuple(float(v) for v in (found.astype(np.uint32) << 16).view(np.float32))
