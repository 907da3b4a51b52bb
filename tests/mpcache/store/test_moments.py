"""Recorded statistics of rows agree with float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching

from mpcache.numba_jit import compiled
from mpcache.store.moments import measure_rows, merge_moments

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@DTYPES
@settings(max_examples=25)
@given(
    rows=st.integers(1, 600),
    width=st.integers(1, 70),
    offset=st.sampled_from([0.0, 3.0, 3000.0]),
    broken=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_measures_what_float64_says(
    dtype: torch.dtype, rows: int, width: int, offset: float, broken: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x_RW = torch.randn(rows, width, generator=draw) * torch.logspace(-3, 2, width)
    x_RW[:, 0] += offset
    for row in torch.randint(rows, (broken,), generator=draw):
        bad = (float("nan"), float("inf"), -float("inf"))[int(row) % 3]
        x_RW[row, int(row) % width] = bad
    x_RW = x_RW.to(dtype)
    exact = x_RW.double().numpy()
    finite = exact[np.isfinite(exact).all(axis=1)]
    measured = measure_rows(x_RW)
    assert measured.moments.rows == len(finite)
    assert measured.statistics.nonfinite == int((~np.isfinite(exact)).sum())
    if len(finite):
        mean, variance = finite.mean(axis=0), finite.var(axis=0)
        np.testing.assert_allclose(measured.moments.mean_W, mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(measured.moments.variance_W, variance, rtol=1e-9, atol=1e-12)
    assert measured.statistics.largest == np.abs(exact[np.isfinite(exact)]).max(initial=0)
    with np.errstate(invalid="ignore"):
        norms = np.sqrt((exact**2).sum(axis=1)).astype(np.float32)
    np.testing.assert_allclose(measured.norms_R, norms, rtol=1e-6)


def test_a_dimension_far_from_zero_loses_nothing() -> None:
    x_RW = torch.randn(5000, 3) * 1e-2 + torch.tensor([0.0, 1e3, -1e4])
    moments, exact = measure_rows(x_RW).moments, x_RW.double()
    torch.testing.assert_close(moments.variance_W, exact.var(0, correction=0), rtol=1e-10, atol=0)
    assert merge_moments([moments, moments]).rows == 10_000


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 3.0, 3000.0]),
    seed=st.integers(0, 99),
)
def test_moments_of_parts_merge_to_those_of_all_rows(
    sizes: list[int], offset: float, seed: int
) -> None:
    """Whatever the parts' own means; a part may have no finite row."""
    draw = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(rows, 3, generator=draw) + offset * torch.randn(3, generator=draw)
        for rows in sizes
    ]
    merged = merge_moments([measure_rows(x_RW).moments for x_RW in parts])
    exact = torch.cat(parts).double()
    assert merged.rows == len(exact)
    if len(exact):
        torch.testing.assert_close(merged.mean_W, exact.mean(0), rtol=1e-12, atol=1e-12)
        variance_W = exact.var(0, correction=0)
        torch.testing.assert_close(merged.variance_W, variance_W, rtol=1e-9, atol=1e-9)


def test_kernels_compile_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only installation without a home, as in containers."""

    def refused(_: object) -> None:
        raise PermissionError

    for kind in vars(caching).values():
        if isinstance(kind, type) and hasattr(kind, "ensure_cache_path"):
            monkeypatch.setattr(kind, "ensure_cache_path", refused)
    assert compiled()(lambda x: x + 1)(2) == 3
