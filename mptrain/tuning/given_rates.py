"""Whether the best of the learning rates that a run was given lies at the edge of the list."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mptrain.config.coder import CoderConfig
from mptrain.runs.results import CoderResult


def edge_warnings(coders: Sequence[CoderConfig], results: Sequence[CoderResult]) -> Iterator[str]:
    """Yield a warning for each coder whose best rate is the lowest or the highest of several.

    Rates beyond the list were not tried, so that the best rate may be one of them. A coder that
    diverged, at a rate above the best one, counts as worse.
    """
    fvus = {
        result.coder: result.validation.fvu if result.validation else math.inf for result in results
    }
    by_coder: dict[str, dict[float, float]] = defaultdict(dict)
    for coder in coders:
        if coder.lr is not None:
            by_coder[replace(coder, lr=None).name][coder.lr] = fvus[coder.name]
    for name, fvu_at in by_coder.items():
        best = min(fvu_at, key=lambda lr: fvu_at[lr])
        if len(fvu_at) < 2 or not math.isfinite(fvu_at[best]):
            continue
        if best in (min(fvu_at), max(fvu_at)):
            end, other = ("lowest", "lower") if best == min(fvu_at) else ("highest", "higher")
            yield (
                f"the best lr of {name}, {best:g}, is the {end} that was given, and a {other} lr "
                "may be better; use --tune lr, or more values of --lr"
            )
