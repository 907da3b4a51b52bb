"""Rows at unit norm."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mptrain.kernels.unit_norm import normalise_rows_, project_rows_


@given(width=st.integers(1, 3000), scale=st.floats(-9, 9), seed=st.integers(0, 99))
def test_norms_are_one_within_units_in_the_last_place(width: int, scale: float, seed: int):
    rows = 10**scale * torch.randn(9, width, generator=torch.Generator().manual_seed(seed))
    normalise_rows_(rows)
    off_M = (rows.double().norm(dim=1) - 1).abs()
    assert off_M.max() <= 4 * torch.finfo(torch.float32).eps


def test_a_projected_gradient_does_not_change_norms():
    rows, gradient = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(0)).unbind()
    normalise_rows_(rows)
    expected = gradient - (gradient * rows).sum(1, keepdim=True) * rows
    project_rows_(gradient, rows)
    torch.testing.assert_close(gradient, expected)
    assert (gradient * rows).sum(1).abs().max() < 1e-5
