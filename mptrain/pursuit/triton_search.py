"""Atoms found by Triton kernels: product with all of them and choice in one, no score is written.

B rows in a batch, D input width, M latents, S candidates of a shortlist, N groups of
latents, P parts of the latents. Tiles are fixed: a tuned choice could change a sum.

Import it where `kernels.triton_support.available` says so. `no_type_check` keeps the tests'
type-checking hook off the kernels, whose source Triton compiles.
"""

from typing import Literal, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

Sign = Literal["positive", "signed", "magnitude"]
"""Which atom is best and what its value may be: `positive` takes the largest correlation `p` and
`a = max(0, p)`, `signed` the largest `p` and `a = p`, `magnitude` the largest `|p|` and `a = p`."""
Precision = Literal["ieee", "tf32x3"]
"""How a GPU multiplies float32: `tf32x3` on tensor cores, nearly as exact as `ieee`, but faster."""

_ROWS, _ATOMS = 128, 64  # of a tile of scores; with more atoms, registers spill
_PROGRAMS = 1024  # that a search of all atoms should have: several for each core of a GPU
_GROUPS = 4  # groups of latents for each candidate


def best_atoms(
    r_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "latents input"],
    sign: Sign = "positive",
    precision: Precision = "tf32x3",
) -> Int64[Tensor, " batch"]:
    """First largest `<w_j, r_b>` of each row (`magnitude`: largest `|<w_j, r_b>|`).

    With `W` in bfloat16 the residual is rounded to it too, and products are added up in float32.
    Scores stay in registers: what is written is `B P` numbers. A row with a NaN gets an atom, no
    matter which.
    """
    (B, D), M = r_BD.shape, len(W_MD)
    atoms = 2 * _ATOMS if W_MD.dtype == torch.bfloat16 else _ATOMS
    blocks = triton.cdiv(M, atoms)
    parts = min(blocks, triton.cdiv(_PROGRAMS, triton.cdiv(max(B, 1), _ROWS)))
    each = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, each)
    score_BP = r_BD.new_empty(B, parts, dtype=torch.float32)
    atom_BP = torch.empty(B, parts, dtype=torch.int64, device=r_BD.device)
    with torch.cuda.device(r_BD.get_device()):
        _best_kernel[(triton.cdiv(B, _ROWS), parts)](
            *(r_BD.to(W_MD.dtype).contiguous(), W_MD.contiguous(), score_BP, atom_BP),
            *(B, M, D, each, parts),
            MAGNITUDE=sign == "magnitude",
            **_tiles(W_MD, atoms, precision),
        )
    return atom_BP.gather(1, score_BP.argmax(1, keepdim=True))[:, 0]


def best_candidates(
    r_BD: Float[Tensor, "batch input"],
    W_MD: Float[Tensor, "latents input"],
    size: int,
    sign: Sign = "positive",
    precision: Precision = "tf32x3",
) -> Int64[Tensor, "batch {size}"]:
    """About the `size` atoms with the largest scores, in no promised order; always the very best.

    Approximate: of each group of latents only the best is looked at, and there are at least `4
    size` groups (or as many as latents). On random scores nine in ten of the `size` best are found,
    and which are missed are mostly late ones: the one of rank `n` is with chance `(n - 1) / N`.
    What is written is `2 B N` numbers. Sizes `D`, `M` and `size` alone decide about the groups.
    """
    (B, D), M = r_BD.shape, len(W_MD)
    groups = _ATOMS * triton.cdiv(min(M, _GROUPS * size), _ATOMS)
    score_BN = r_BD.new_empty(B, groups, dtype=torch.float32)
    atom_BN = torch.empty(B, groups, dtype=torch.int32, device=r_BD.device)
    candidate_BS = torch.empty(B, size, dtype=torch.int64, device=r_BD.device)
    with torch.cuda.device(r_BD.get_device()):
        _group_kernel[(triton.cdiv(B, _ROWS), groups // _ATOMS)](
            *(r_BD.to(W_MD.dtype).contiguous(), W_MD.contiguous(), score_BN, atom_BN, B, M, D),
            groups,
            MAGNITUDE=sign == "magnitude",
            **_tiles(W_MD, _ATOMS, precision),
        )
        block = triton.next_power_of_2(groups)
        _largest_kernel[(B,)](
            *(score_BN, atom_BN, candidate_BS, groups, size),
            BLOCK_N=block,
            num_warps=warps(block, each=512),
        )
    return candidate_BS


def _tiles(W_MD: Tensor, atoms: int, precision: Precision) -> dict[str, int | str]:
    """Three steps of the product, of at most 32 KiB each, lie in shared memory at once."""
    sizes = {"BLOCK_B": _ROWS, "BLOCK_M": atoms, "BLOCK_D": 128 // W_MD.element_size()}
    widen = W_MD.device.type == "cpu"  # Triton's interpreter cannot multiply bfloat16
    return {**sizes, "PRECISION": precision, "WIDEN": widen, "num_warps": 8, "num_stages": 3}


def warps(elements: int, each: int) -> int:
    """Warps of a program that holds a vector; up to the 16 that leave 128 registers a thread."""
    return max(1, min(16, elements // each))


@triton.jit
@no_type_check
def key_of(score, MAGNITUDE: tl.constexpr):
    """What is to be largest. -inf marks what may not be chosen, and stays; a NaN comes last."""
    key = score
    if MAGNITUDE:
        key = tl.where(score == float("-inf"), score, tl.abs(score))
    return tl.where(score == score, key, -3.0e38)


@triton.jit
@no_type_check
def _scores(
    r,
    W,
    row,
    atom,
    B,
    M,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`<w, r>` of a tile; what lies outside reads some row within, and -inf for an atom."""
    r_row = r + (row % B).to(tl.int64)[:, None] * D
    w_row = W + (atom % M).to(tl.int64)[None, :] * D
    score = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        r_tile = tl.load(r_row + d[None, :], mask=(d < D)[None, :], other=0.0)
        w_tile = tl.load(w_row + d[:, None], mask=(d < D)[:, None], other=0.0)
        if WIDEN:
            r_tile, w_tile = r_tile.to(tl.float32), w_tile.to(tl.float32)
        score = tl.dot(r_tile, w_tile, score, input_precision=PRECISION)
    return tl.where((atom < M)[None, :], score, float("-inf"))


@triton.jit
@no_type_check
def _best_kernel(
    r,
    W,
    best_score,
    best_atom,
    B,
    M,
    D,
    each,
    parts,
    MAGNITUDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # programs side by side share atoms, which then come from the L2 cache
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.program_id(1)
    best = tl.full([BLOCK_B], float("-inf"), tl.float32)
    best_j = tl.full([BLOCK_B], 0, tl.int32) + part * each * BLOCK_M
    for block in range(part * each, min((part + 1) * each, tl.cdiv(M, BLOCK_M))):
        atom = block * BLOCK_M + tl.arange(0, BLOCK_M)
        score = _scores(r, W, row, atom, B, M, D, BLOCK_B, BLOCK_M, BLOCK_D, PRECISION, WIDEN)
        score = key_of(score, MAGNITUDE)
        top, position = tl.max(score, 1, return_indices=True)
        best_j = tl.where(top > best, block * BLOCK_M + position, best_j)
        best = tl.where(top > best, top, best)
    at = row.to(tl.int64) * parts + part
    tl.store(best_score + at, best, mask=row < B)
    tl.store(best_atom + at, best_j.to(tl.int64), mask=row < B)


@triton.jit
@no_type_check
def _group_kernel(
    r,
    W,
    best_score,
    best_atom,
    B,
    M,
    D,
    groups,
    MAGNITUDE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best of each group; its latents are `groups` apart, so that no thread needs another's."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    group = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    best = tl.full([BLOCK_B, BLOCK_M], float("-inf"), tl.float32)
    best_j = tl.zeros([BLOCK_B, BLOCK_M], tl.int32) + group[None, :]
    for first in range(0, M, groups):
        atom = first + group
        score = _scores(r, W, row, atom, B, M, D, BLOCK_B, BLOCK_M, BLOCK_D, PRECISION, WIDEN)
        score = key_of(score, MAGNITUDE)
        best_j = tl.where(score > best, atom[None, :], best_j)
        best = tl.maximum(score, best)
    at = row.to(tl.int64)[:, None] * groups + group[None, :]
    tl.store(best_score + at, best, mask=(row < B)[:, None])
    tl.store(best_atom + at, best_j, mask=(row < B)[:, None])


@triton.jit
@no_type_check
def _largest_kernel(score, atom, largest, groups, size, BLOCK_N: tl.constexpr):
    """Exact, by bisection: floats are ordered as their bits are, once those below 0 are turned."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    key = tl.load(score + row * groups + lane, mask=lane < groups, other=float("-inf"))
    bits = key.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    low, high = tl.full([], -(2**31), tl.int64), tl.full([], 2**31, tl.int64)
    for _ in range(32):  # at least `size` are not below `low`, fewer not below `high`
        middle = (low + high) >> 1
        enough = tl.sum((bits >= middle.to(tl.int32)).to(tl.int32), 0) >= size
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = (bits > low.to(tl.int32)).to(tl.int32)
    equal = (bits == low.to(tl.int32)).to(tl.int32)
    # of those equal to the last one, the first ones
    taken = above + equal * (tl.cumsum(equal, 0) <= size - tl.sum(above, 0)).to(tl.int32)
    position = tl.cumsum(taken, 0) - 1
    chosen = tl.load(atom + row * groups + lane, mask=lane < groups, other=0)
    tl.store(largest + row * size + position, chosen.to(tl.int64), mask=taken > 0)
