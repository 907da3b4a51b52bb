"""Rows, dictionaries, rules and searches, for tests of pursuits.

B rows in a batch, D input width, M latents, K pursuit steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from mptrain.pursuit import numba_backend
from mptrain.pursuit.backend import AtomSearch

DIRECT = AtomSearch(
    backend="direct", shortlist_size=10**6, shortlist_refresh=1, score_dtype="float32"
)
GRAM = replace(DIRECT, backend="gram")
ALL_ATOMS = replace(DIRECT, backend="shortlist")  # all atoms, recomputed at every step
SHORT = replace(ALL_ATOMS, shortlist_size=3, shortlist_refresh=2)
ONE_ATOM = replace(ALL_ATOMS, shortlist_size=1, shortlist_refresh=3)
GRAM16, ALL_ATOMS16, SHORT16 = (
    replace(search, score_dtype="bfloat16") for search in (GRAM, ALL_ATOMS, SHORT)
)

EXACT = (DIRECT, GRAM, ALL_ATOMS, ALL_ATOMS16)
EVERY = (*EXACT, GRAM16, SHORT, SHORT16, ONE_ATOM)

NOISE = 1e-9  # values below this are rounding noise, and so is their presence


class Layout(NamedTuple):
    """How many rows the dictionaries have, and whether steps go by blocks of latents."""

    name: str
    in_blocks: bool = False
    selecting: int | None = 1
    "blocks of rows; None: as many as steps"
    subtracting: int | None = 1
    is_tied: bool = True

    def dictionaries(
        self, generator: torch.Generator, D: int, M: int, k: int, *, unit: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`W`, `U`; with blocks, `M` is the size of a block."""
        W_MD = atoms(generator, M * (self.selecting or k), D, unit=unit)
        if self.is_tied:
            return W_MD, W_MD
        return W_MD, atoms(generator, M * (self.subtracting or k), D, unit=unit)


LAYOUTS = (
    Layout("tied"),
    Layout("separate", is_tied=False),
    Layout("blocks-tied", in_blocks=True, selecting=None),
    Layout("blocks-separate", in_blocks=True, selecting=None, subtracting=None, is_tied=False),
    Layout("blocks-share-selecting", in_blocks=True, subtracting=None, is_tied=False),
    Layout("blocks-share-subtracting", in_blocks=True, selecting=None, is_tied=False),
    Layout("blocks-share-both", in_blocks=True, is_tied=False),
    Layout("blocks-share-tied", in_blocks=True),
)


class Baseline(NamedTuple):
    """A search, in compiled kernels or in whole-matrix steps as on other devices."""

    search: AtomSearch
    is_compiled: bool = True

    @property
    def name(self) -> str:
        search = self.search
        form = "" if self.is_compiled else "-whole-matrices"
        return f"{search.backend}{search.shortlist_size}-{search.score_dtype}{form}"

    @contextmanager
    def forced(self) -> Iterator[None]:
        with patch.object(numba_backend, "applies", lambda _: self.is_compiled):
            yield


BASELINES_IN_BLOCKS = (Baseline(DIRECT), Baseline(replace(DIRECT, backend="auto")))


def baselines(searches: tuple[AtomSearch, ...], in_blocks: bool = False) -> tuple[Baseline, ...]:
    """Each search in each form that can run it; with blocks, the two that support them."""
    if in_blocks:
        return BASELINES_IN_BLOCKS
    both = [s for s in searches if s.backend != "direct"]
    return (*(Baseline(s) for s in searches), *(Baseline(s, is_compiled=False) for s in both))


def atoms(
    generator: torch.Generator,
    M: int,
    D: int,
    *,
    unit: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Random directions, of unit norm or of norms around 1."""
    W_MD = torch.randn(M, D, generator=generator, dtype=dtype)
    W_MD /= W_MD.norm(dim=1, keepdim=True)
    return W_MD if unit else W_MD * (0.6 + 0.6 * torch.rand(M, 1, generator=generator, dtype=dtype))


def problem(
    seed: int, B: int, D: int, M: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random rows, the second of them zero, and unit-norm atoms."""
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(B, D, generator=generator, dtype=dtype)
    x_BD[1:2] = 0
    return x_BD, atoms(generator, M, D, dtype=dtype)


sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "B": st.integers(1, 9) | st.sampled_from([16, 17, 33]),
        "D": st.integers(1, 6),
        "M": st.integers(1, 14) | st.sampled_from([127, 128, 129, 256, 300]),
    }
)


def without_noise(idx_BK: Tensor, val_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The code without values that are rounding noise."""
    is_noise_BK = val_BK.abs() <= NOISE
    order_BK = is_noise_BK.sort(dim=1, stable=True).indices
    idx_BK, val_BK = idx_BK.masked_fill(is_noise_BK, -1), val_BK.masked_fill(is_noise_BK, 0)
    return idx_BK.gather(1, order_BK), val_BK.gather(1, order_BK)


def assert_same_code(
    actual: tuple[Tensor, ...], expected: tuple[Tensor | np.ndarray, ...], latents: int
) -> None:
    """Check that indices (modulo `latents`), values and residuals are equal up to rounding."""
    idx_BK, val_BK = without_noise(*actual[:2])
    expected_idx_BK, expected_val_BK = without_noise(*map(torch.as_tensor, expected[:2]))
    used_BK = (idx_BK >= 0) | (expected_idx_BK >= 0)
    assert torch.equal(idx_BK[used_BK] % latents, expected_idx_BK[used_BK] % latents)
    torch.testing.assert_close(val_BK, expected_val_BK, atol=1e-10, rtol=1e-9)
    residual_BD = torch.as_tensor(expected[2])
    torch.testing.assert_close(actual[2], residual_BD, atol=1e-10, rtol=1e-9)


def assert_well_formed(idx_BK: Tensor, val_BK: Tensor, block: int | None = None) -> None:
    """Check that unused entries are -1 and 0 and come last; with blocks, step i uses block i."""
    assert idx_BK.dtype == torch.int64
    used_BK = idx_BK >= 0
    assert (idx_BK >= -1).all()
    assert (used_BK == (val_BK != 0)).all()
    if block is None:
        assert (used_BK[:, 1:] <= used_BK[:, :-1]).all()
    else:
        step_K = torch.arange(idx_BK.shape[1])
        assert ((idx_BK // block == step_K) | ~used_BK).all()


def explained(idx_BK: Tensor, val_BK: Tensor, U_MD: Tensor) -> Tensor:
    """What a code subtracts from its rows."""
    return (val_BK[:, :, None] * U_MD[idx_BK % len(U_MD)]).sum(1)
