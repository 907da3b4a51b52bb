"""Norms, moments and checks of captured rows, in pieces that stay in the processor's cache.

Shapes: R rows, W width.
"""

import math
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

    def merged(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        rows = self.rows + other.rows
        if not rows:
            return self
        share = other.rows / rows
        delta_W = other.mean_W - self.mean_W
        variance_W = (1 - share) * self.variance_W + share * other.variance_W
        variance_W = variance_W + delta_W.square() * (share * (1 - share))
        return Moments(rows, self.mean_W + share * delta_W, variance_W)


def no_moments(width: int) -> Moments:
    """Moments of no rows: the start of a merge."""
    zeros_W = torch.zeros(width, dtype=torch.float64)
    return Moments(0, zeros_W, zeros_W)


def _pieces(x_RW: Float[Tensor, "R W"]) -> tuple[Tensor, ...]:
    return torch.split(x_RW, _PIECE_ROWS)


def row_norms(x_RW: Float[Tensor, "R W"]) -> Float32[Tensor, " R"]:
    """Euclidean norm of each row; not finite where a value is not, or where float32 overflows."""
    return torch.cat([torch.linalg.vector_norm(p.float(), dim=1) for p in _pieces(x_RW)])


def moments(x_RW: Float[Tensor, "R W"], nonfinite: int) -> Moments:
    """Moments over the rows that are finite throughout; `nonfinite` counts the other values."""
    if nonfinite:
        x_RW = x_RW[x_RW.isfinite().all(dim=1)]
    if not len(x_RW):
        return no_moments(x_RW.shape[1])
    buffer_RW = torch.empty(_PIECE_ROWS, x_RW.shape[1], dtype=torch.float64)
    pieces = [_piece_moments_(buffer_RW[: len(p)].copy_(p)) for p in _pieces(x_RW)]
    share_P = torch.tensor([piece.rows for piece in pieces], dtype=torch.float64) / len(x_RW)
    mean_PW = torch.stack([piece.mean_W for piece in pieces])
    mean_W = share_P @ mean_PW
    within_PW = torch.stack([piece.variance_W for piece in pieces])
    return Moments(len(x_RW), mean_W, share_P @ (within_PW + (mean_PW - mean_W).square()))


def _piece_moments_(x_RW: Float64[Tensor, "R W"]) -> Moments:
    """Moments of a few rows, which are overwritten."""
    rows = len(x_RW)
    # a product with a row of 1/rows sums over rows several times faster than .mean(0)
    weights_1R = torch.full((1, rows), 1 / rows, dtype=torch.float64)
    mean_W = (weights_1R @ x_RW)[0]
    return Moments(rows, mean_W, (weights_1R @ x_RW.sub_(mean_W).square_())[0])


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
