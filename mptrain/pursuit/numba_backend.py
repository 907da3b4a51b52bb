"""Pursuits on a CPU, row by row in a core's cache, in the kernels of `numba_kernels`.

As loops over whole matrices, each step would go through all scores of a micro-batch several times;
here a row's scores stay in the cache from its first step to its last. Threads share out the rows,
or columns where rows would be added to in turn: the order of every sum is fixed.

b rows of one micro-batch, B of a batch, D input width, M latents, K pursuit steps.
"""

import threading

import numpy as np
import torch
from torch import Tensor

from mptrain.kernels.thread_pool import in_pieces
from mptrain.pursuit.numba_kernels import (
    MODES,
    backward_dictionaries_,
    backward_values_,
    gram_rows_,
    shortlist_rows_,
)
from mptrain.pursuit.rule import N_RESCORED, Rule

_Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

_PIECE = 16  # rows that a thread takes at once
_COLUMNS = 64  # columns, likewise


def applies(tensor: Tensor) -> bool:
    """Whether these kernels are for the device of a tensor; else steps go over whole matrices."""
    return tensor.device.type == "cpu"


class _Room(threading.local):
    """Each thread's memory for Gram matrices, kept from one batch to the next."""

    bytes_N = torch.empty(0, dtype=torch.uint8)


_room = _Room()


def room_for(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix to be filled, the same memory whenever a thread asks: one at a time is in use.

    The system takes as long to hand out a Gram matrix's pages as torch to fill them. NumPy asks it
    for huge ones.
    """
    needed = rows * columns * dtype.itemsize
    if len(_room.bytes_N) < needed:
        _room.bytes_N = torch.empty(0, dtype=torch.uint8)  # first the smaller one goes
        _room.bytes_N = torch.from_numpy(np.empty(needed, np.uint8))
    return _room.bytes_N[:needed].view(dtype).view(rows, columns)


def free_room() -> None:
    """Give that memory back."""
    _room.bytes_N = torch.empty(0, dtype=torch.uint8)


def pursue_by_gram_(
    G_MM: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    rule: Rule,
    r_bD: Tensor,
    idx_bK: Tensor,
    val_bK: Tensor,
) -> None:
    """All steps of a micro-batch; `G[j]` is what one of atom `j` takes from the scores.

    In: `r` the rows. Out: `idx`, `val` and `r`, the last residual.
    """
    is_bfloat16 = G_MM.dtype == torch.bfloat16
    bits_MM = G_MM.view(torch.uint16) if is_bfloat16 else G_MM  # numpy has no bfloat16
    rescored, mode = N_RESCORED if is_bfloat16 else 1, MODES[rule.select]
    of_rows = (r_bD @ W_MD.T, r_bD, rule.stop_norm(r_bD), idx_bK, val_bK)
    arrays = [_array(t) for t in (bits_MM, W_MD, U_MD, *of_rows)]

    def work(first: int, end: int) -> None:
        G, W, U, *rest = arrays
        score, r, stop_norm, idx, val = (array[first:end] for array in rest)
        gram_rows_(score, G, is_bfloat16, rescored, W, U, r, stop_norm, idx, val, mode)

    in_pieces(work, len(r_bD), _PIECE)


def pursue_by_shortlist_(
    scoring_MD: Tensor,
    size: int,
    refresh: int,
    W_MD: Tensor,
    U_MD: Tensor,
    rule: Rule,
    r_bD: Tensor,
    idx_bK: Tensor,
    val_bK: Tensor,
) -> None:
    """All steps of a micro-batch, `refresh` of them among the `size` best by `scoring`, exactly."""
    arrays = [_array(t) for t in (W_MD, U_MD, r_bD, rule.stop_norm(r_bD), idx_bK, val_bK)]
    K, mode = idx_bK.shape[1], MODES[rule.select]
    for step in range(0, K, refresh):
        score_bM = (r_bD.to(scoring_MD.dtype) @ scoring_MD.T).to(r_bD.dtype)
        score = _array(score_bM.abs_() if rule.select == "magnitude" else score_bM)

        def work(first: int, end: int, score: _Array = score, step: int = step) -> None:
            W, U, *of_rows = arrays
            r, stop_norm, idx, val = (array[first:end] for array in of_rows)
            last = min(step + refresh, K)
            shortlist_rows_(score[first:end], size, W, U, r, stop_norm, idx, val, step, last, mode)

        in_pieces(work, len(r_bD), _PIECE)


def pursue_backward(
    idx_BK: Tensor,
    val_BK: Tensor,
    dval_BK: Tensor,
    residual_BD: Tensor,
    dresidual_BD: Tensor,
    W_MD: Tensor,
    U_MD: Tensor,
    detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows and of both dictionaries: `mptrain.pursuit.backward`.

    Where the dictionaries are one, so are their gradients.
    """
    dx_BD, s_BK = dresidual_BD.clone(), torch.zeros_like(val_BK)
    dW_MD = torch.zeros_like(W_MD)
    dU_MD = dW_MD if U_MD is W_MD else torch.zeros_like(U_MD)
    idx, val, dval, residual, g = map(_array, (idx_BK, val_BK, dval_BK, residual_BD, dresidual_BD))
    W, U, dx, s, dW, dU = map(_array, (W_MD, U_MD, dx_BD, s_BK, dW_MD, dU_MD))

    def values(first: int, end: int) -> None:
        here = slice(first, end)
        backward_values_(idx[here], dval[here], g[here], W, U, detach, dx[here], s[here])

    def dictionaries(first: int, end: int) -> None:
        backward_dictionaries_(idx, val, s, residual, g, W, U, detach, first, end, dW, dU)

    in_pieces(values, len(idx_BK), _PIECE)
    in_pieces(dictionaries, W_MD.shape[1], _COLUMNS)
    return dx_BD, dW_MD, dU_MD


def _array(tensor: Tensor) -> _Array:
    array: _Array = tensor.detach().numpy()
    return array
