"""Which values of a setting to train next, so that the best has a worse value on either side.

Values lie on a grid of powers, `start * factor ** position`; position 0 is the start.
"""

import math
from collections.abc import Mapping

FARTHEST = 12
"strides that are tried on each side of the start at most"
_STRIDES_BEYOND = 2  # strides that are trained in one round beyond a best value at an edge


def next_positions(fvu: Mapping[int, float], stride: int = 1) -> tuple[int, ...]:
    """Positions to train next, in order; empty where the search is over.

    The first round is the start and a stride to each side. As long as the best value is at an edge
    of what was trained, a round adds two strides beyond it. Then the neighbours of the best
    position are trained. Ties count as best on the inner side, so that a setting without effect
    ends the search.

    Args:
        fvu: FVU by position; infinite or NaN where the coder diverged.
        stride: positions from one value to the next until the best is between two others.
    """
    if not fvu:
        return (-stride, 0, stride)
    low, high = min(fvu), max(fvu)
    best = best_position(fvu)
    if best is None or best == low:  # all diverged
        wanted = range(low - _STRIDES_BEYOND * stride, low, stride)
    elif best == high:
        wanted = range(high + stride, high + stride * _STRIDES_BEYOND + 1, stride)
    else:
        return tuple(position for position in (best - 1, best + 1) if position not in fvu)
    return tuple(position for position in wanted if abs(position) <= FARTHEST * stride)


def best_position(fvu: Mapping[int, float]) -> int | None:
    """The position of the least finite FVU, of equal ones the nearest to 0; None without any."""
    finite = {position: value for position, value in fvu.items() if math.isfinite(value)}
    if not finite:
        return None
    return min(finite, key=lambda position: (finite[position], abs(position)))


def is_at_edge(position: int, fvu: Mapping[int, float]) -> bool:
    """Whether a lower or a higher value might be better: none was trained beyond this one."""
    return position in (min(fvu), max(fvu))


def value_at(start: float, factor: float, position: int) -> float:
    """The value at a position, in the six digits that the name of a coder shows."""
    return float(f"{start * factor**position:.6g}")
