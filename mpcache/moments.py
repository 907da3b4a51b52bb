"""Norms, moments and checks of captured rows, in pieces that stay in the processor's cache.

Shapes: R rows, W width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

_PIECE_ROWS = 256
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Moments:
    """Mean and centred second moment (variance, divided by the count) per dimension, float64."""

    rows: int
    mean_W: Float64[Tensor, " W"]
    variance_W: Float64[Tensor, " W"]


def no_moments(width: int) -> Moments:
    """Moments of no rows: the start of a merge."""
    zeros_W = torch.zeros(width, dtype=torch.float64)
    return Moments(0, zeros_W, zeros_W)


@dataclass(frozen=True)
class Measured:
    """All that is recorded of a part's rows on one side of a hookpoint."""

    moments: Moments
    "over the rows that are finite throughout"
    norms_R: Float32[Tensor, " R"]
    "Euclidean norm of each row; not finite where a value is not"
    largest: float
    "largest finite absolute value"
    nonfinite: int
    "values that are infinite or not a number"


def measure(x_RW: Float[Tensor, "R W"]) -> Measured:
    """Read the rows once, a few at a time, in float64."""
    pieces = [_measure_piece(piece_RW) for piece_RW in torch.split(x_RW, _PIECE_ROWS)]
    return Measured(
        moments=merged([piece.moments for piece in pieces]),
        norms_R=torch.cat([piece.norms_R for piece in pieces]),
        largest=max(piece.largest for piece in pieces),
        nonfinite=sum(piece.nonfinite for piece in pieces),
    )


def _measure_piece(stored_RW: Float[Tensor, "R W"]) -> Measured:
    x_RW = stored_RW.double()
    norms_R = torch.linalg.vector_norm(x_RW, dim=1).float()
    largest, nonfinite = magnitudes(stored_RW)
    if nonfinite:
        x_RW = x_RW[x_RW.isfinite().all(dim=1)]
    return Measured(_moments_(x_RW), norms_R, largest, nonfinite)


def _moments_(x_RW: Float64[Tensor, "R W"]) -> Moments:
    """Moments of finite rows, which are overwritten."""
    rows = len(x_RW)
    if not rows:
        return no_moments(x_RW.shape[1])
    # a product with a row of 1/rows sums over rows several times faster than .mean(0)
    weights_1R = torch.full((1, rows), 1 / rows, dtype=torch.float64)
    mean_W = (weights_1R @ x_RW)[0]
    return Moments(rows, mean_W, (weights_1R @ x_RW.sub_(mean_W).square_())[0])


def merged(pieces: Sequence[Moments]) -> Moments:
    """Moments of all rows together (Chan, Golub & LeVeque 1979, eq. 2.1, for many sets)."""
    rows = sum(piece.rows for piece in pieces)
    share_P = torch.tensor([piece.rows / max(1, rows) for piece in pieces], dtype=torch.float64)
    mean_PW = torch.stack([piece.mean_W for piece in pieces])
    mean_W = share_P @ mean_PW
    within_PW = torch.stack([piece.variance_W for piece in pieces])
    return Moments(rows, mean_W, share_P @ (within_PW + (mean_PW - mean_W).square()))


def largest_magnitude(x_RW: Float[Tensor, "R W"]) -> float:
    """Largest absolute value, infinity or NaN included.

    Compares bit patterns: without its sign bit a float orders as an integer, and every non-finite
    value lies above the finite ones, so one integer maximum also tells whether all are finite.
    """
    if not x_RW.numel():
        return 0.0
    integer = _INTEGERS[x_RW.dtype]
    bits = (x_RW.view(integer) & torch.iinfo(integer).max).max()
    return float(bits.view(x_RW.dtype))


def magnitudes(x_RW: Float[Tensor, "R W"]) -> tuple[float, int]:
    """Largest finite absolute value, and how many values are infinite or not a number."""
    largest = largest_magnitude(x_RW)
    if math.isfinite(largest):
        return largest, 0
    is_finite = x_RW.isfinite()
    finite_RW = torch.where(is_finite, x_RW, torch.zeros_like(x_RW))
    return largest_magnitude(finite_RW), int((~is_finite).sum())
