"""What a store holds: progress and provenance (`info`), statistics of its rows (`stats`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpcache.format import TOKENS, acts, specs
from mpcache.place import Place
from mpcache.reader import Store, open_store

_OUTLIER = 10.0  # a dimension's root mean square over the median dimension's


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


def info(where: str | Path | Place) -> dict[str, Any]:
    """Provenance, and rows, bytes and parts done of each array, as plain values."""
    store = open_store(where)
    planned = set(store.numbers(TOKENS))
    return {
        "store": str(store.place),
        "fingerprint": store.fingerprint,
        "identity": store.identity,
        "provenance": store.provenance,
        "dtype": store.layout.dtype,
        "codec": store.layout.codec,
        "part_rows": store.part_rows,
        "chunk_rows": store.chunk_rows,
        "parts_planned": len(planned),
        "rows_planned": _rows(store, TOKENS),
        "hookpoints": [_side_info(store, h, s) for h in store.hookpoints for s in store.sides(h)],
    }


def _side_info(store: Store, hookpoint: str, side: str) -> dict[str, Any]:
    array = acts(hookpoint, side)
    marks = store.marks(array)
    return {
        "hookpoint": hookpoint,
        "side": side,
        "width": store.width(hookpoint, side),
        "parts": len(marks),
        "rows": _rows(store, array),
        "rows_validation": sum(m["rows"] for m in marks if m["split"] == "validation"),
        "bytes": sum(o["bytes"] for m in marks for o in m["objects"].values()),
        "nonfinite": store.nonfinite(hookpoint, side),
    }


def _rows(store: Store, array: str) -> int:
    return sum(int(mark["rows"]) for mark in store.marks(array))


def stats(where: str | Path | Place) -> tuple[SideStats, ...]:
    """Statistics of every collected side, from the moments and norms that were stored with it."""
    store = open_store(where)
    return tuple(_side_stats(store, h, s) for h in store.hookpoints for s in store.sides(h))


def _side_stats(store: Store, hookpoint: str, side: str) -> SideStats:
    array = acts(hookpoint, side)
    mean_W, variance_W = store.moments(hookpoint, side)
    median, high, largest_norm = _norm_quantiles(store, array, (0.5, 0.99, 1.0))
    marks = store.marks(array)
    return SideStats(
        hookpoint=hookpoint,
        side=side,
        rows=_rows(store, array),
        width=len(mean_W),
        mean_norm=float(mean_W.norm()),
        variance=float(variance_W.sum()),
        norm_median=median,
        norm_99=high,
        norm_largest=largest_norm,
        largest=max(m["largest"] for m in marks),
        outlier_dimensions=_outliers(mean_W, variance_W),
        nonfinite=store.nonfinite(hookpoint, side),
    )


def _outliers(mean_W: Tensor, variance_W: Tensor) -> tuple[int, ...]:
    rms_W = (variance_W + mean_W.square()).sqrt()
    return tuple(torch.nonzero(rms_W > _OUTLIER * rms_W.median()).flatten().tolist())


def _norm_quantiles(
    store: Store, array: str, shares: tuple[float, ...]
) -> tuple[float | None, ...]:
    """Quantiles of the rows' finite norms, rounded to bfloat16 (1 in 256).

    A histogram over the upper 16 bits of a float32 has 65 536 bins of equal relative width, so that
    memory does not grow with the store.
    """
    counts = np.zeros(1 << 16, np.int64)
    _, spec, _ = specs(array, store.layout, store.width(*array.split("/")[1:]))
    for part in store.numbers(array):
        rows = int(store.mark(part, array)["rows"])
        norms = store.read_object(array, spec, part, 0, rows)
        bins = norms[np.isfinite(norms)].view(np.uint32) >> 16
        counts += np.bincount(bins, minlength=len(counts))
    below = np.cumsum(counts)
    if not below[-1]:
        return (None,) * len(shares)
    found = np.searchsorted(below, [max(1, share * below[-1]) for share in shares])
    return tuple(float(v) for v in (found.astype(np.uint32) << 16).view(np.float32))
