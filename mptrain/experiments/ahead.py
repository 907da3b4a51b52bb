"""From which share of its training on a coder stays ahead of another: has the lower FVU."""

from collections.abc import Sequence

Curve = Sequence[tuple[float, float]]
"(x, FVU) of each validation in their order; x is rows, or train seconds"


def fvu_at(curve: Curve, x: float) -> float:
    """FVU at x: linear between two validations, constant outside."""
    before = [point for point in curve if point[0] <= x]
    after = [point for point in curve if point[0] > x]
    if not before or not after:
        return after[0][1] if after else before[-1][1]
    (x_before, fvu), (x_after, fvu_after) = before[-1], after[0]
    return fvu + (fvu_after - fvu) * (x - x_before) / (x_after - x_before)


def ahead_from(curve: Curve, other: Curve) -> float | None:
    """Return the share of a curve's x from which its FVU stays below that of another at equal x.

    The share is that of the first validation from which on the curve is below at every validation
    of both. A coder keeps its FVU after its training, so that the slower of two coders is compared
    with what the faster one had in the end.

    Returns:
        0 if the curve is below from its first validation on; None if there is no such validation.
    """
    start, end = curve[0][0], curve[-1][0]
    compared = {x for x, _ in (*curve, *other) if x >= start}
    not_below = [x for x in compared if fvu_at(curve, x) >= fvu_at(other, x)]
    if not not_below:
        return 0.0
    return next((x / end for x, _ in curve if x > max(not_below)), None)


def describe_lead(by_rows: Sequence[float | None], by_seconds: Sequence[float | None]) -> str:
    """Say from which shares MP stays below TopK, given the shares of each panel."""
    rows, seconds = _in_words(by_rows, "rows"), _in_words(by_seconds, "train time")
    return f"MP stays below TopK: at equal rows {rows}; at equal train time {seconds}"


def _in_words(shares: Sequence[float | None], quantity: str) -> str:
    known = [share for share in shares if share is not None]
    if not known:
        return "never"
    low, high = f"{100 * min(known):.0f}", f"{100 * max(known):.0f}"
    percent = low if low == high else f"{low} to {high}"
    text = "from the start" if percent == "0" else f"from {percent} % of its {quantity} on"
    return text if len(shares) == 1 else f"{text} in {len(known)} of {len(shares)} panels"
