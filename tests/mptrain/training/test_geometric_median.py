"""The geometric median."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptrain.training.geometric_median import geometric_median


@given(rows=st.integers(3, 60), width=st.integers(2, 9), seed=st.integers(0, 99))
def test_no_point_nearby_has_a_smaller_sum_of_distances(rows: int, width: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(rows, width, generator=generator, dtype=torch.float64) + 3
    median_D = geometric_median(x_ND)
    least = (x_ND - median_D).norm(dim=1).sum()
    for _ in range(20):
        step_D = torch.randn(width, generator=generator, dtype=torch.float64)
        near_D = median_D + 1e-2 * step_D / step_D.norm()
        assert (x_ND - near_D).norm(dim=1).sum() > least - 1e-7 * rows


def test_few_far_rows_do_not_move_it():
    x_ND = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    far_ND = torch.cat([x_ND, torch.full((50, 8), 1e4)])
    assert float(far_ND.mean(0).norm()) > 1000
    assert float(geometric_median(far_ND).norm()) < 0.5


def test_rows_that_are_all_the_same():
    torch.testing.assert_close(geometric_median(torch.full((5, 3), 2.0)), torch.full((3,), 2.0))


def test_no_rows():
    with pytest.raises(ValueError, match="the filters exclude all rows"):
        geometric_median(torch.zeros(0, 3))
