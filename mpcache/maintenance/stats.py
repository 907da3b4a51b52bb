"""Statistics of the rows of a store.

They come from the norms and moments that were stored with each part, summed in the order of parts,
so that they do not depend on parallelism. Memory for each part in work at the same time: its norms,
part_rows x 12 bytes, and a histogram of 0.5 MB; for each side three float64 numbers per dimension.

Shapes: R rows of a part, W width.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map
from mpcache.storage.atomic_files import replace_file
from mpcache.storage.base import Storage
from mpcache.store.moments import Moments, empty_moments, merge_moments
from mpcache.store.object_paths import acts_array, array_specs, hookpoint_of
from mpcache.store.reader import Store, open_store

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
    "median norm of rows with a finite norm; None if there are none"
    norm_99: float | None
    norm_largest: float | None
    largest: float
    "largest finite magnitude of a value"
    outlier_dimensions: tuple[int, ...]
    "dimensions whose root mean square is over 10 times the median dimension's"
    nonfinite: int


@dataclass(frozen=True, eq=False)
class MeasuredSide:
    """Statistics of one side of a hookpoint, and its moments in each dimension."""

    stats: SideStats
    moments: Moments
    "mean and variance of each dimension, `[W]` in float64"


def stats(
    store: str | Path | Storage,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
) -> tuple[MeasuredSide, ...]:
    """Mean, variance, norms, outlier dimensions and non-finite counts of every collected side.

    Args:
        store: Path, or `s3://` or `gs://` URL, of the store.
        parallel: Threads and processes that read parts. They do not change the result.
        quiet: Without a progress bar.

    Raises:
        UsageError: There is no store.
        DamagedStoreError: A mark, or stored norms or moments, are not what was committed.

    Example:
        ```python
        from mpcache import stats

        for side in stats("store"):
            print(side.stats.hookpoint, side.stats.side, side.stats.norm_median)
        ```
    """
    opened = open_store(store)
    arrays = [acts_array(h, s) for h in opened.hookpoints for s in opened.sides(h)]
    marks = [(part, array) for array in arrays for part in opened.part_numbers(array)]
    results = ordered_map(functools.partial(_measure_part, opened), marks, parallel, quiet=quiet)
    with tqdm(results, "stats", len(marks), unit="mark", disable=quiet) as bar:
        parts = iter(bar)
        return tuple(
            _measure_side(opened, a, islice(parts, len(opened.part_numbers(a)))) for a in arrays
        )


def save_dimensions(sides: Iterable[MeasuredSide], path: Path) -> None:
    """Write mean and variance of each dimension, and the finite rows, to a safetensors file."""
    tensors = {}
    for side in sides:
        name = f"{side.stats.hookpoint}/{side.stats.side}"
        tensors[f"{name}/mean"] = side.moments.mean_W
        tensors[f"{name}/variance"] = side.moments.variance_W
        tensors[f"{name}/finite_rows"] = torch.tensor(side.moments.rows)
    replace_file(path, save(tensors))


@dataclass(frozen=True, eq=False)
class _MeasuredPart:
    """What one part adds to the statistics of its side."""

    rows: int
    moments: Moments
    norm_counts: np.ndarray
    largest: float
    nonfinite: int


def _measure_part(store: Store, task: tuple[int, str]) -> _MeasuredPart:
    part, array = task
    mark = store.mark(part, array)
    assert mark.statistics is not None, array
    _, norms, _ = array_specs(array, store.layout, mark.width)
    norms_R = store.reader.read_object(array, norms, part, 0, mark.rows)
    return _MeasuredPart(
        rows=mark.rows,
        moments=store.acts.part_moments(array, part),
        norm_counts=_norm_counts(norms_R),
        largest=mark.statistics.largest,
        nonfinite=mark.nonfinite,
    )


def _measure_side(store: Store, array: str, parts: Iterable[_MeasuredPart]) -> MeasuredSide:
    hookpoint, side = hookpoint_of(array)
    moments = empty_moments(store.width(hookpoint, side))
    counts = np.zeros(_NORM_BINS, np.int64)
    rows, largest, nonfinite = 0, 0.0, 0
    for part in parts:
        moments = merge_moments([moments, part.moments])
        counts += part.norm_counts
        rows, nonfinite = rows + part.rows, nonfinite + part.nonfinite
        largest = max(largest, part.largest)
    median, high, largest_norm = _quantiles(counts, (0.5, 0.99, 1.0))
    side_stats = SideStats(
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
    return MeasuredSide(side_stats, moments)


def _outliers(mean_W: Tensor, variance_W: Tensor) -> tuple[int, ...]:
    rms_W = (variance_W + mean_W.square()).sqrt()
    return tuple(torch.nonzero(rms_W > _OUTLIER * rms_W.median()).flatten().tolist())


def _norm_counts(norms_R: np.ndarray) -> np.ndarray:
    """A histogram of finite norms by their upper 16 bits: bins of equal relative width, 1/128."""
    bins = norms_R[np.isfinite(norms_R)].view(np.uint32) >> 16
    return np.bincount(bins, minlength=_NORM_BINS)


def _quantiles(counts: np.ndarray, shares: tuple[float, ...]) -> tuple[float | None, ...]:
    """Quantiles of the norms in a histogram, rounded down to their bins; None if it is empty."""
    below = np.cumsum(counts)
    if not below[-1]:
        return (None,) * len(shares)
    bins = np.searchsorted(below, [max(1, share * below[-1]) for share in shares])
    return tuple(float(v) for v in (bins.astype(np.uint32) << 16).view(np.float32))
