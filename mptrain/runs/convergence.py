"""Whether a coder was still improving at the end of its training.

Within a stretch of a run, held-out FVU over rows is close to a power law. Its slope at the end is
no measure of what more rows would gain: while the learning rate falls to 0, FVU falls too, and a
run of twice the length does not gain that fall a second time. So the gain is extrapolated from the
middle of the run. docs/training.md compares it with runs of twice the length.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mptrain.runs.metrics_file import Record

MIN_VALIDATIONS = 3
"for a slope"
MIDDLE = Fraction(1, 5), Fraction(3, 5)
"shares of the rows between which the gain is measured: FVU has settled, the rate is still high"
END = Fraction(4, 5), Fraction(1)
FALLING_ABOVE = 0.01
(
    "a larger extrapolated gain counts as still falling: three seeds of a coder of the demo differ "
    "by up to 1.5 % of their FVU, so that a smaller gain does not change a comparison"
)


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """How the held-out FVU of a coder fell. b is the exponent of `FVU = a * rows ** b`."""

    slope: float
    (
        "b over the last fifth of the rows, by least squares of the logarithms; FVU falls there "
        "mostly because the learning rate does"
    )
    middle_slope: float
    "b between a fifth and three fifths of the rows"
    gain_of_doubling: float
    (
        "share by which a run of twice the rows would lower FVU: "
        "`1 - 2 ** (middle_slope * (1 + e))`, where `2 ** e` is the learning rate that the default "
        "rule gives twice the steps, relative to the rate of this run"
    )
    still_falling: bool
    "whether `gain_of_doubling` is over 1 %"


def convergence_of(records: Iterable[Record], rate_exponent: float) -> Convergence | None:
    """Return how a coder's FVU fell, from all its records in their order.

    The default learning rate is in proportion to `steps ** rate_exponent`: see `RateRule.steps`.

    All validations that have records are on the same `eval_rows` held-out rows; the final
    evaluation, which has no record, is on other rows and is left out.

    Returns:
        None if the coder diverged, or has fewer than three validations in a stretch.
    """
    # rows before filters: they are in proportion to the train steps
    curve = [(r.rows, r.validation_fvu) for r in records if r.validation_fvu is not None]
    middle, end = (
        [point for point in curve if _is_within(stretch, point[0], curve[-1][0])]
        for stretch in (MIDDLE, END)
    )
    if min(len(middle), len(end)) < MIN_VALIDATIONS:
        return None
    if not all(math.isfinite(fvu) and fvu > 0 for _, fvu in (*middle, *end)):
        return None
    middle_slope = _slope(middle)
    # with the lower rate of a longer run, twice the rows move weights by less than twice as much
    gain = 1 - 2 ** (middle_slope * (1 + rate_exponent))
    return Convergence(
        slope=_slope(end),
        middle_slope=middle_slope,
        gain_of_doubling=gain,
        still_falling=gain > FALLING_ABOVE,
    )


def validation_steps(steps: int, eval_every: int) -> list[int]:
    """Return the train steps after which a run is validated.

    They are each `eval_every`-th step and the last step. A run of at least ten steps has others, at
    most five, where the regular ones are too few for a slope.
    """
    validated = {*range(eval_every, steps + 1, eval_every), steps}
    for stretch in (MIDDLE, END):
        regular = [step for step in validated if _is_within(stretch, step, steps)]
        if len(regular) < MIN_VALIDATIONS and steps >= 10:
            first, last = math.ceil(stretch[0] * steps), math.floor(stretch[1] * steps)
            validated |= {first, (first + last) // 2, last}
    return sorted(validated)


def describe_convergence(coders: Sequence[Convergence | None]) -> str | None:
    """Say in a sentence which coders were still falling; None where no coder has a slope."""
    known = [coder for coder in coders if coder is not None]
    if not known:
        return None
    gains = [coder.gain_of_doubling for coder in known if coder.still_falling]
    if not gains:
        return (
            f"None of the {len(known)} coders with enough validations was still falling: twice the "
            f"rows would lower FVU by at most {FALLING_ABOVE:.0%}, extrapolated from the middle of "
            "the run"
        )
    low, high = f"{100 * min(gains):.2g}", f"{100 * max(gains):.2g}"
    amount = low if low == high else f"{low} to {high}"
    return (
        f"Still falling: {len(gains)} of {len(known)} coders; twice the rows would lower FVU by "
        f"about {amount} %, extrapolated from the middle of the run"
    )


def _is_within(stretch: tuple[Fraction, Fraction], position: int, end: int) -> bool:
    return stretch[0] * end <= position <= stretch[1] * end


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """The slope of the line through the logarithms of some points, by least squares."""
    x, y = [math.log(rows) for rows, _ in points], [math.log(fvu) for _, fvu in points]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)
