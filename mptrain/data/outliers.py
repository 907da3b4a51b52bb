"""Massive activations: whether a few rows have most of the variance of a side.

N rows of a part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mptrain.config.sides import Side
from mptrain.data.filters import Filters
from mptrain.data.loader import Store

OUTLIER_NORM = 10.0
"times the median norm"
DOMINANT_SHARE = 0.5
"of the sum of squares of all rows"


def outlier_warnings(store: Store, filters: Filters, sides: Sequence[Side]) -> Iterator[str]:
    """Yield a warning for each side where a few of the rows that filters keep outweigh the others.

    Such rows are massive activations (Sun et al. 2024, arXiv 2402.17762): most often first tokens,
    delimiters or special tokens. Reads norms of the first train part, and no values. Squares are
    about 0, not about the mean of the rows: such rows lie far from both.
    """
    for side in sides:
        rows_share, squares_share = _outliers(store, filters, side)
        if squares_share > DOMINANT_SHARE:
            yield (
                f"{':'.join(side)}: {100 * rows_share:.2g} % of the rows have more than "
                f"{OUTLIER_NORM:g} times the median norm and {100 * squares_share:.3g} % of the "
                "sum of squares, so that FVU says little of the other rows; "
                f"{_remedy(store, filters, side)} leaves them out"
            )


def _remedy(store: Store, filters: Filters, side: Side) -> str:
    """The first filter after which the other rows decide."""
    special = store.special_ids or ()
    options = {
        "--skip-positions 1": replace(filters, skip_positions=max(1, filters.skip_positions)),
        "--skip-tokens special": replace(filters, skip_tokens=(*filters.skip_tokens, *special)),
    }
    for option, changed in options.items():
        if _outliers(store, changed, side)[1] <= DOMINANT_SHARE:
            return option
    return f"--max-norm {OUTLIER_NORM:g}"


def _outliers(store: Store, filters: Filters, side: Side) -> tuple[float, float]:
    """Shares of the kept rows that are outliers: of their number, and of their sum of squares."""
    norms_N = _kept_norms(store, filters, side)
    if len(norms_N) == 0:
        return 0.0, 0.0
    squares_N = norms_N.square()
    is_outlier_N = norms_N > OUTLIER_NORM * norms_N.median()
    rows_share = float(is_outlier_N.double().mean())
    return rows_share, float(squares_N[is_outlier_N].sum() / squares_N.sum().clamp_min(1e-300))


def _kept_norms(store: Store, filters: Filters, side: Side) -> Tensor:
    """Norms of the rows of the first train part that a coder of this side would train on."""
    part = store.parts([side], "train")[0].number
    norms_N = store.acts.read_norms(*side, part)
    kept_N = filters.of([side]).passed(
        store.tokens.read_positions(part),
        store.tokens.read_token_ids(part) if filters.skip_tokens else None,
        {side: norms_N},
        store.tokens.read_assistant(part) if filters.only_tokens == "assistant" else None,
    )
    return norms_N[kept_N & norms_N.isfinite()].to(torch.float64)
