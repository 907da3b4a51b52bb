"""Whether a coder was still improving at the end of its training.

Held-out FVU over rows is close to a power law within a short stretch, so that its slope in
logarithms says by how much FVU would fall with twice the rows. docs/training.md compares this
extrapolation with runs of twice the length.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mptrain.runs.metrics_file import Record

MIN_VALIDATIONS = 3
"in the last fifth of the rows; with fewer, there is no slope to fit"
FALLING_ABOVE = 0.01
(
    "a larger extrapolated gain counts as still falling: three seeds of a coder of the demo differ "
    "by up to 1.5 % of their FVU, so that a smaller gain does not change a comparison"
)


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """How the held-out FVU of a coder fell over the last fifth of its rows."""

    slope: float
    "b of the power law `FVU = a * rows ** b`, by least squares of the logarithms"
    gain_of_doubling: float
    "`1 - 2 ** slope`: the share by which twice the rows would lower FVU, by this power law"
    still_falling: bool
    "whether `gain_of_doubling` is over 1 %"
    validations: int
    "validations in the last fifth of the rows"


def convergence_of(records: Iterable[Record]) -> Convergence | None:
    """Return how a coder's FVU fell in the end, from all its records in their order.

    All validations that have records are on the same `eval_rows` held-out rows; the final
    evaluation, which has no record, is on other rows and is left out.

    None: the coder has fewer than three validations in the last fifth of its rows, or it diverged.
    """
    # rows before filters: they are in proportion to the train steps, and so is their last fifth
    curve = [(r.rows, r.validation_fvu) for r in records if r.validation_fvu is not None]
    last = [(rows, fvu) for rows, fvu in curve if _is_in_last_fifth(rows, curve[-1][0])]
    if len(last) < MIN_VALIDATIONS or not all(math.isfinite(fvu) and fvu > 0 for _, fvu in last):
        return None
    slope = _slope([math.log(rows) for rows, _ in last], [math.log(fvu) for _, fvu in last])
    gain = 1 - 2**slope
    return Convergence(
        slope=slope,
        gain_of_doubling=gain,
        still_falling=gain > FALLING_ABOVE,
        validations=len(last),
    )


def validation_steps(steps: int, eval_every: int) -> list[int]:
    """Return the train steps after which a run is validated.

    They are each `eval_every`-th step, the last step, and in a run of at least ten steps as many
    others as a slope over the last fifth needs.
    """
    regular = {*range(eval_every, steps + 1, eval_every), steps}
    if sum(_is_in_last_fifth(step, steps) for step in regular) < MIN_VALIDATIONS and steps >= 10:
        regular |= {-(-8 * steps // 10), -(-9 * steps // 10)}
    return sorted(regular)


def describe_convergence(coders: Sequence[Convergence | None]) -> str | None:
    """Say in a sentence which coders were still falling; None where no coder has a slope."""
    known = [coder for coder in coders if coder is not None]
    if not known:
        return None
    gains = [coder.gain_of_doubling for coder in known if coder.still_falling]
    if not gains:
        return (
            f"No coder was still falling: twice the rows would lower FVU by at most "
            f"{FALLING_ABOVE:.0%}, extrapolated from the last fifth of the rows"
        )
    low, high = f"{100 * min(gains):.2g}", f"{100 * max(gains):.2g}"
    amount = low if low == high else f"{low} to {high}"
    return (
        f"Still falling: {len(gains)} of {len(coders)} coders; twice the rows would lower FVU by "
        f"{amount} %, extrapolated from the last fifth of the rows"
    )


def _is_in_last_fifth(position: int, end: int) -> bool:
    return 5 * position >= 4 * end


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the line through some points, by least squares."""
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)
