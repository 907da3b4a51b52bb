"""Kernels of `numba_backend`: one thread's work on some rows. Compiled at the first use, then kept.

`mode` says how keys come of scores (`MODES`). `no_type_check` keeps the tests' type-checking hook
off what Numba compiles. b rows, D input width, M latents, K pursuit steps.
"""

from typing import no_type_check

import numpy as np

from mpcache.numba_jit import compiled

LANES = 128  # running maxima side by side: as fast as the cache gives the scores
MODES = {"positive": 0, "signed": 1, "magnitude": 2}

# sums may be reordered (SIMD); values that are not finite must stay so
_compiled = compiled(fastmath={"contract", "reassoc", "nsz", "arcp"})


@_compiled
@no_type_check
def gram_rows_(score, G, is_bfloat16, rescored, W, U, r, stop_norm, idx, val, mode):
    """Two rows go side by side: while one waits for its row of `G`, the other's is on its way."""
    b, K = idx.shape
    lanes = np.empty(LANES, score.dtype)
    for row in range(0, b, 2):
        other = min(row + 1, b - 1)
        goes_on, other_goes_on = True, other > row
        for step in range(K):
            if goes_on:
                goes_on = _gram_step_(
                    row, step, score, lanes, rescored, W, U, r, stop_norm, idx, val, mode
                )
            if other_goes_on:
                other_goes_on = _gram_step_(
                    other, step, score, lanes, rescored, W, U, r, stop_norm, idx, val, mode
                )
            if step + 1 == K or not (goes_on or other_goes_on):
                break
            first = row if goes_on else other
            second = other if other_goes_on else first
            p_M, a, g_M = score[first], val[first, step], G[idx[first, step]]
            q_M, c, h_M = score[second], val[second, step], G[idx[second, step]]
            if is_bfloat16 and first != second:
                _subtract_both_bfloat16_(p_M, a, g_M, q_M, c, h_M)
            elif is_bfloat16:
                _subtract_bfloat16_(p_M, a, g_M)
            elif first != second:
                _subtract_both_(p_M, a, g_M, q_M, c, h_M)
            else:
                _subtract_(p_M, a, g_M)


@_compiled
@no_type_check
def _gram_step_(row, step, score, lanes, rescored, W, U, r, stop_norm, idx, val, mode):
    p_M, r_D, chosen = score[row], r[row], idx[row]
    if rescored > 1:
        atom = first_of_few(p_M, lanes, rescored, W, r_D, mode)
    else:
        atom = first_largest(p_M, lanes, mode)
    return _take_(atom, W, U, r_D, stop_norm[row], mode, step, chosen, val[row])


@_compiled
@no_type_check
def shortlist_rows_(score, size, W, U, r, stop_norm, idx, val, first, end, mode):
    lanes = np.empty((4 * size + LANES - 1) // LANES * LANES, score.dtype)
    listed = np.empty(score.shape[1], np.int64)
    keys = np.empty(score.shape[1], score.dtype)
    for row in range(len(idx)):
        p, r_D, chosen, values = score[row], r[row], idx[row], val[row]
        count = largest(p, size, lanes, keys, listed)
        for step in range(first, end):
            best, atom = r.dtype.type(-np.inf), -1
            for position in range(count):
                at = listed[position]
                key = _key(_dot(W[at], r_D), mode)
                if key > best:
                    best, atom = key, at
            if not _take_(atom, W, U, r_D, stop_norm[row], mode, step, chosen[:end], values[:end]):
                break


@_compiled
@no_type_check
def _take_(atom, W, U, r_D, stop_norm, mode, step, chosen, values):
    """Take one step; if the row stops instead, mark this step and all later ones as unused."""
    # without an atom: 0, or NaN if the row is not finite
    a = _dot(r_D, r_D) * 0 if atom < 0 else _dot(W[max(atom, 0)], r_D)
    stops = a == 0 or (mode == 0 and a < 0)
    if stop_norm > 0 and np.sqrt(_dot(r_D, r_D)) <= stop_norm:
        stops = True
    if stops:
        for later in range(step, len(chosen)):
            chosen[later] = -1
            values[later] = 0
        return False
    chosen[step], values[step] = max(atom, 0), a
    _subtract_(r_D, a, U[max(atom, 0)])
    return True


@_compiled
@no_type_check
def backward_values_(idx, dval, g, W, U, detach, dx, s):
    for row in range(len(idx)):
        g_D = g[row] if detach else dx[row]
        for step in range(idx.shape[1] - 1, -1, -1):
            latent = idx[row, step]
            if latent < 0:
                continue
            s[row, step] = dval[row, step] - _dot(U[latent % len(U)], g_D)
            _subtract_(dx[row], -s[row, step], W[latent % len(W)])


@_compiled
@no_type_check
def backward_dictionaries_(idx, val, s, residual, g, W, U, detach, first, end, dW, dU):
    for row in range(len(idx)):
        r_d, g_d = residual[row, first:end].copy(), g[row, first:end].copy()
        for step in range(idx.shape[1] - 1, -1, -1):
            latent = idx[row, step]
            if latent < 0:
                continue
            at_W, at_U = latent % len(W), latent % len(U)
            _subtract_(r_d, -val[row, step], U[at_U, first:end])
            _subtract_(dW[at_W, first:end], -s[row, step], r_d)
            _subtract_(dU[at_U, first:end], val[row, step], g_d)
            if not detach:
                _subtract_(g_d, -s[row, step], W[at_W, first:end])


@_compiled
@no_type_check
def _lane_maxima_(p, lanes, mode):
    """Put the largest key of every `len(lanes)`-th score, from each lane's first on, into lanes.

    There are some times `LANES` of them; inner loops of a constant length are twice as fast.
    """
    lanes[:] = -np.inf
    whole = len(p) // LANES * LANES
    for first in range(0, whole, LANES):
        part, maxima = p[first : first + LANES], lanes[first % len(lanes) :]
        if mode == 2:
            for lane in range(LANES):
                key = abs(part[lane])
                maxima[lane] = key if key > maxima[lane] else maxima[lane]
        else:
            for lane in range(LANES):
                maxima[lane] = part[lane] if part[lane] > maxima[lane] else maxima[lane]
    for at in range(whole, len(p)):
        key = _key(p[at], mode)
        if key > lanes[at % len(lanes)]:
            lanes[at % len(lanes)] = key


@_compiled
@no_type_check
def first_largest(p, lanes, mode):
    """The first index with the largest key; -1 where there is none but -inf or NaN."""
    _lane_maxima_(p, lanes, mode)
    best, atom = p.dtype.type(-np.inf), len(p)
    for lane in range(len(lanes)):
        best = lanes[lane] if lanes[lane] > best else best
    if best == -np.inf:
        return -1
    for lane in range(len(lanes)):
        if lanes[lane] == best:
            atom = min(atom, _first_equal(p, lane, len(lanes), best, mode))
    return atom


@_compiled
@no_type_check
def first_of_few(p, lanes, rescored, W, r_D, mode):
    """The same of inexact scores: the `rescored` that seem best, at least, are scored again."""
    _lane_maxima_(p, lanes, mode)
    largest = np.full(rescored, -np.inf, p.dtype)  # falling
    for lane in range(len(lanes)):
        position = rescored - 1
        if lanes[lane] > largest[position]:
            while position > 0 and lanes[lane] > largest[position - 1]:
                largest[position] = largest[position - 1]
                position -= 1
            largest[position] = lanes[lane]
    best, atom = p.dtype.type(-np.inf), -1
    for lane in range(len(lanes)):
        if lanes[lane] < largest[-1] or lanes[lane] == -np.inf:
            continue
        for at in range(lane, len(p), len(lanes)):
            if _key(p[at], mode) >= largest[-1]:
                key = _key(_dot(W[at], r_D), mode)
                if key > best or (key == best and at < atom):
                    best, atom = key, at
    return atom


@_compiled
@no_type_check
def _first_equal(p, first, stride, best, mode):
    for at in range(first, len(p), stride):
        if _key(p[at], mode) == best:
            return at
    return len(p)


@_compiled
@no_type_check
def largest(p, size, lanes, keys, listed):
    """Put the indices of the `size` largest, ascending, into `listed`; gives how many there are.

    Each of the `size` lanes with the largest maxima holds one, so that their least is a bound.
    """
    M, n = len(p), len(lanes)
    bound = p.dtype.type(-np.inf)
    if 2 * n <= M:
        _lane_maxima_(p, lanes, 0)
        bound = nth_largest_(lanes, size)
    count = 0
    for at in range(M):
        if p[at] >= bound and p[at] > -np.inf:
            keys[count], listed[count] = p[at], at
            count += 1
    if count <= size:
        return count
    least = nth_largest_(keys[:count].copy(), size)
    above = 0
    for position in range(count):
        above += keys[position] > least
    equals, kept = size - above, 0
    for position in range(count):
        if keys[position] > least or (keys[position] == least and equals > 0):
            equals -= keys[position] == least
            listed[kept] = listed[position]
            kept += 1
    return kept


@_compiled
@no_type_check
def nth_largest_(values, n):
    """The `n`-th largest value, by quickselect; reorders."""
    low, high, position = 0, len(values) - 1, n - 1
    while low < high:
        pivot, i, j = values[(low + high) // 2], low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if position <= j:
            high = j
        elif position >= i:
            low = i
        else:
            break
    return values[position]


@_compiled
@no_type_check
def _key(p, mode):
    return abs(p) if mode == 2 else p


@_compiled
@no_type_check
def _dot(w, r):
    total = r.dtype.type(0)
    for d in range(len(r)):
        total += w[d] * r[d]
    return total


@_compiled
@no_type_check
def _subtract_(r, a, w):
    for d in range(len(r)):
        r[d] -= a * w[d]


@_compiled
@no_type_check
def _subtract_bfloat16_(r, a, bits):
    """A bfloat16 number has the upper half of the bits of the same number in float32."""
    for d in range(len(r)):
        r[d] -= a * np.uint32(np.uint32(bits[d]) << np.uint32(16)).view(np.float32)


@_compiled
@no_type_check
def _subtract_both_(r, a, w, s, c, v):
    for d in range(len(r)):
        r[d] -= a * w[d]
        s[d] -= c * v[d]


@_compiled
@no_type_check
def _subtract_both_bfloat16_(r, a, w_bits, s, c, v_bits):
    for d in range(len(r)):
        r[d] -= a * np.uint32(np.uint32(w_bits[d]) << np.uint32(16)).view(np.float32)
        s[d] -= c * np.uint32(np.uint32(v_bits[d]) << np.uint32(16)).view(np.float32)
