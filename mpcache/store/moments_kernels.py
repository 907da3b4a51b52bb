"""Passes over rows for norms, moments and largest values. Compiled at the first use, then kept.

`no_type_check` keeps the tests' type-checking hook off what Numba compiles.
"""

import math
from typing import no_type_check

import numpy as np

from mpcache.numba_jit import compiled


@compiled()
@no_type_check
def largest_bits(bits_RW):
    """Largest magnitude of float32 values, all given as their bits, infinity or NaN included.

    Without its sign bit a float orders as an integer, and every non-finite value lies above the
    finite ones, so one integer maximum also tells whether all are finite.
    """
    R, W = bits_RW.shape
    largest, magnitude = np.int32(0), np.int32(0x7FFFFFFF)
    for r in range(R):
        for w in range(W):
            largest = max(largest, np.int32(bits_RW[r, w] & magnitude))
    return largest


# sums may be reordered (SIMD); values that are not finite must stay so
@compiled(fastmath={"contract", "reassoc", "nsz", "arcp"})
@no_type_check
def add_rows_(x_RW, shift_W, sum_W, square_W, norms_R):
    """Add to float64 sums of `x - shift` and of its square; norms of the rows of `x` itself.

    Four rows side by side, so that the sums are loaded and stored once for them.
    """
    R, W = x_RW.shape
    alone = R % 4
    for r in range(alone):
        n0 = 0.0
        for w in range(W):
            x0 = np.float64(x_RW[r, w])
            d0 = x0 - shift_W[w]
            n0 += x0 * x0
            sum_W[w] += d0
            square_W[w] += d0 * d0
        norms_R[r] = math.sqrt(n0)
    for r in range(alone, R, 4):
        n0, n1, n2, n3 = 0.0, 0.0, 0.0, 0.0
        for w in range(W):
            x0, x1 = np.float64(x_RW[r, w]), np.float64(x_RW[r + 1, w])
            x2, x3 = np.float64(x_RW[r + 2, w]), np.float64(x_RW[r + 3, w])
            n0, n1, n2, n3 = n0 + x0 * x0, n1 + x1 * x1, n2 + x2 * x2, n3 + x3 * x3
            shift = shift_W[w]
            d0, d1, d2, d3 = x0 - shift, x1 - shift, x2 - shift, x3 - shift
            sum_W[w] += (d0 + d1) + (d2 + d3)
            square_W[w] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        norms_R[r], norms_R[r + 1] = math.sqrt(n0), math.sqrt(n1)
        norms_R[r + 2], norms_R[r + 3] = math.sqrt(n2), math.sqrt(n3)
