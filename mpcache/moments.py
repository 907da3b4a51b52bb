"""Norms, moments and checks of captured rows, in pieces that stay in the processor's cache.

Shapes: R rows, W width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

_PIECE_ROWS = 256


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
    """Read the rows once, a few at a time; every sum is in float64."""
    scratch_RW = torch.empty(_PIECE_ROWS, x_RW.shape[1])  # once: each new one would be page faults
    pieces = [
        _measure_piece(scratch_RW[: len(piece_RW)].copy_(piece_RW))
        for piece_RW in torch.split(x_RW, _PIECE_ROWS)
    ]
    return Measured(
        moments=merged([piece.moments for piece in pieces]),
        norms_R=torch.cat([piece.norms_R for piece in pieces]),
        largest=max(piece.largest for piece in pieces),
        nonfinite=sum(piece.nonfinite for piece in pieces),
    )


def _measure_piece(x_RW: Float32[Tensor, "R W"]) -> Measured:
    largest, nonfinite = magnitudes(x_RW)
    moments, norms_R = _sums(x_RW)
    if nonfinite:
        moments, _ = _sums(x_RW[x_RW.isfinite().all(dim=1)])
    return Measured(moments, norms_R, largest, nonfinite)


def _sums(x_RW: Float32[Tensor, "R W"]) -> tuple[Moments, Float32[Tensor, " R"]]:
    """Moments, where all rows are finite, and norms, in any case.

    About the first row, not about zero: where a mean is many times the deviation from it, nothing
    is lost.
    """
    from mpcache.sums import add_rows_  # brings Numba, which who only reads does not need

    rows, width = x_RW.shape
    if not rows:
        return no_moments(width), torch.empty(0)
    norms_R, shift_W = np.empty(rows), x_RW[0].double()
    sum_W, square_W = np.zeros(width), np.zeros(width)
    add_rows_(x_RW.numpy(), shift_W.numpy(), sum_W, square_W, norms_R)
    off_W = torch.from_numpy(sum_W) / rows
    variance_W = (torch.from_numpy(square_W) / rows - off_W.square()).clamp_(min=0)
    return Moments(rows, shift_W + off_W, variance_W), torch.from_numpy(norms_R).float()


def merged(pieces: Sequence[Moments]) -> Moments:
    """Moments of all rows together (Chan, Golub & LeVeque 1979, eq. 2.1, for many sets)."""
    rows = sum(piece.rows for piece in pieces)
    share_P = torch.tensor([piece.rows / max(1, rows) for piece in pieces], dtype=torch.float64)
    mean_PW = torch.stack([piece.mean_W for piece in pieces])
    mean_W = share_P @ mean_PW
    within_PW = torch.stack([piece.variance_W for piece in pieces])
    return Moments(rows, mean_W, share_P @ (within_PW + (mean_PW - mean_W).square()))


def magnitudes(x_RW: Float32[Tensor, "R W"]) -> tuple[float, int]:
    """Largest finite absolute value, and how many values are infinite or not a number."""
    from mpcache.sums import largest_bits

    def largest(x_RW: Float32[Tensor, "R W"]) -> float:
        return float(np.int32(largest_bits(x_RW.view(torch.int32).numpy())).view(np.float32))

    found = largest(x_RW)
    if math.isfinite(found):
        return found, 0
    is_finite = x_RW.isfinite()
    return largest(torch.where(is_finite, x_RW, 0.0)), int((~is_finite).sum())
