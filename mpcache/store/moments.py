"""Norms, moments and checks of captured rows, in pieces that stay in the processor's cache.

Shapes: R rows, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from mpcache.store.mark import RowStatistics

_PIECE_ROWS = 256
_INFINITE = 0x7F800000  # bits of the float32 infinity, beyond which there are only NaNs


@dataclass(frozen=True)
class Moments:
    """Mean and centred second moment (variance, divided by the count) per dimension, float64."""

    rows: int
    mean_W: Float64[Tensor, " W"]
    variance_W: Float64[Tensor, " W"]


def empty_moments(width: int) -> Moments:
    """Moments of no rows: the start of a merge."""
    zeros_W = torch.zeros(width, dtype=torch.float64)
    return Moments(0, zeros_W, zeros_W)


@dataclass(frozen=True)
class RowMeasurements:
    """What is recorded about a part's rows on one side of a hookpoint."""

    moments: Moments
    "over the rows that are finite throughout"
    norms_R: Float32[Tensor, " R"]
    "Euclidean norm of each row; not finite where a value is not"
    statistics: RowStatistics
    "what the mark says of the rows"


def measure_rows(x_RW: Float[Tensor, "R W"]) -> RowMeasurements:
    """Norms, moments and statistics of rows, read once, a few at a time; sums are in float64.

    Moments are summed about the first finite row, not about zero: where a mean is many times the
    deviation from it, nothing is lost.
    """
    rows, width = x_RW.shape
    finite = (x_RW[n] for n in range(rows) if x_RW[n].isfinite().all())
    sums = _Sums(next(finite, torch.zeros(width)))
    scratch_RW = torch.empty(_PIECE_ROWS, width)  # once: page faults cost more than the copy
    norms_R = np.empty(rows)
    for start in range(0, rows, _PIECE_ROWS):
        stored_RW = x_RW[start : start + _PIECE_ROWS]
        piece_RW = scratch_RW[: len(stored_RW)].copy_(stored_RW)
        sums.add_(piece_RW, norms_R[start : start + _PIECE_ROWS])
    return RowMeasurements(
        moments=sums.moments(),
        norms_R=torch.from_numpy(norms_R).float(),
        statistics=RowStatistics(
            width=width,
            finite_rows=sums.rows,
            largest=float(np.int32(sums.largest_bits).view(np.float32)),
            nonfinite=sums.nonfinite,
        ),
    )


class _Sums:
    """Sums over pieces of rows."""

    def __init__(self, row_W: Tensor) -> None:
        self.shift_W = row_W.double().numpy()
        self.sum_W, self.square_W = np.zeros(len(row_W)), np.zeros(len(row_W))
        self.rows = self.nonfinite = self.largest_bits = 0

    def add_(self, x_RW: Tensor, norms_R: np.ndarray) -> None:
        """Add float32 rows, and set their norms."""
        from mpcache.store.moments_kernels import (  # brings Numba, which readers do not need
            add_rows_,
            largest_bits,
        )

        bits = int(largest_bits(x_RW.view(torch.int32).numpy()))
        if bits >= _INFINITE:
            add_rows_(x_RW.numpy(), self.shift_W, *np.zeros_like([self.sum_W] * 2), norms_R)
            is_finite_RW = x_RW.isfinite()
            self.nonfinite += int((~is_finite_RW).sum())
            finite_RW = torch.where(is_finite_RW, x_RW, 0)
            bits = int(largest_bits(finite_RW.view(torch.int32).numpy()))
            x_RW = x_RW[is_finite_RW.all(dim=1)]
            norms_R = np.empty(len(x_RW))
        add_rows_(x_RW.numpy(), self.shift_W, self.sum_W, self.square_W, norms_R)
        self.rows += len(x_RW)
        self.largest_bits = max(self.largest_bits, bits)

    def moments(self) -> Moments:
        """Over the rows that are finite throughout."""
        if not self.rows:
            return empty_moments(len(self.sum_W))
        off_W = self.sum_W / self.rows
        variance_W = np.maximum(self.square_W / self.rows - off_W**2, 0)
        mean_W = self.shift_W + off_W
        return Moments(self.rows, torch.from_numpy(mean_W), torch.from_numpy(variance_W))


def merge_moments(pieces: Sequence[Moments]) -> Moments:
    """Moments of all rows together (Chan, Golub & LeVeque 1979, eq. 2.1, for many sets)."""
    rows = sum(piece.rows for piece in pieces)
    share_P = torch.tensor([piece.rows / max(1, rows) for piece in pieces], dtype=torch.float64)
    mean_PW = torch.stack([piece.mean_W for piece in pieces])
    mean_W = share_P @ mean_PW
    within_PW = torch.stack([piece.variance_W for piece in pieces])
    return Moments(rows, mean_W, share_P @ (within_PW + (mean_PW - mean_W).square()))
