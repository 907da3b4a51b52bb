"""Pursuit with a soft threshold: each step takes `max(0, <w, r> - shrink)`.

B rows in a batch, D input width, M latents, K pursuit steps.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mptrain.pursuit.autograd import matching_pursuit
from mptrain.pursuit.rule import Rule
from tests.helpers.pursuits import ALL_ATOMS, DIRECT, GRAM, atoms, problem, sizes
from tests.helpers.trainers import BASE, fvus_of, make_learner, rows_of, train_

SOFT = replace(BASE, shrink=0.2)


def plain(x_BD: Tensor, W_MD: Tensor, U_MD: Tensor, k: int, shrink: float) -> tuple[Tensor, Tensor]:
    """Dense codes and residuals, row by row, by autograd."""
    codes, residuals = [], []
    for x_D in x_BD:
        r_D, code_M = x_D, x_D.new_zeros(len(W_MD))
        for _ in range(k):
            score_M = W_MD @ r_D
            j = int(score_M.argmax())
            a = score_M[j] - shrink
            if a <= 1e-10:  # an atom that was chosen, but for rounding
                break
            code_M = code_M + a * torch.eye(len(W_MD), dtype=a.dtype)[j]
            r_D = r_D - a * U_MD[j]
        codes.append(code_M)
        residuals.append(r_D)
    return torch.stack(codes), torch.stack(residuals)


@given(sizes=sizes, k=st.integers(1, 5), shrink=st.sampled_from([0.1, 0.5]), tied=st.booleans())
@settings(max_examples=15)
def test_values_and_gradients_equal_autograd(
    sizes: dict[str, int], k: int, shrink: float, tied: bool
) -> None:
    x_BD, W_MD = problem(**sizes)
    U_MD = W_MD if tied else atoms(torch.Generator().manual_seed(3), *W_MD.shape)
    leaves = [t.requires_grad_() for t in ([x_BD, W_MD] if tied else [x_BD, W_MD, U_MD])]

    def with_gradients(code_BM: Tensor, r_BD: Tensor) -> list[Tensor]:
        loss = code_BM.square().sum() + (r_BD * r_BD.detach().cos()).sum()
        return [code_BM, r_BD, *torch.autograd.grad(loss, leaves, materialize_grads=True)]

    expected = with_gradients(*plain(x_BD, W_MD, U_MD, k, shrink))
    for search in (DIRECT, GRAM, ALL_ATOMS):
        idx_BK, val_BK, r_BD = matching_pursuit(x_BD, W_MD, U_MD, k, Rule(shrink=shrink), search)
        assert ((idx_BK < 0) == (val_BK == 0)).all()
        code_BM = val_BK.new_zeros(len(x_BD), len(W_MD) + 1).scatter_add(1, idx_BK + 1, val_BK)
        for a, b in zip(with_gradients(code_BM[:, 1:], r_BD), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_rows_stop_where_no_correlation_is_above_the_threshold() -> None:
    x_BD, W_MD = problem(1, 30, 6, 20)
    idx_BK, _, r_BD = matching_pursuit(x_BD, W_MD, W_MD, 50, Rule(shrink=0.3), DIRECT)
    stopped_B = idx_BK[:, -1] == -1
    assert stopped_B.sum() > 15, "others are still on their way"
    assert ((r_BD[stopped_B] @ W_MD.T).amax(1) <= 0.3 + 1e-9).all()


def test_learns_and_changes_the_training() -> None:
    trainer = make_learner(replace(SOFT, lr=2e-2))
    fvus = fvus_of(trainer)
    assert sum(fvus[-5:]) < 0.8 * sum(fvus[:5])
    assert train_(make_learner(SOFT), 0, 5) != train_(make_learner(BASE), 0, 5)
    entries = [
        int((make_learner(c).coder.encode(rows_of(c, 50, 9)[0]).idx_BK >= 0).sum())
        for c in (replace(BASE, k=12), replace(BASE, k=12, shrink=2.0))
    ]
    assert entries[1] < entries[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": "signed"}, "shrink needs select=positive, got select=signed"),
        ({"codes": "gp"}, "codes cannot be combined with shrink"),
        ({"normalise": True}, "needs normalise=False, got normalise=True; use --no-normalise"),
        ({"shrink": -1.0}, "shrink must be at least 0 and finite"),
        ({"arch": "topk"}, "shrink has no effect on kind=sae with arch=topk"),
    ],
    ids=str,
)
def test_refuses_what_has_no_meaning(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SOFT, **changes)
