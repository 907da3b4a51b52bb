"""SignSGD with schedule-free averaging (Bernstein et al. 2018, arXiv 1802.04434; Defazio et al.
2024, arXiv 2405.15682, algorithm 1).

There are three points: z takes the steps, x is the average of all z, and gradients are taken at
`y = (1 - beta) z + beta x`. A parameter is y; z and x are its state, so that evaluation reads x and
switches nothing. With `g` the gradient at y and `lr_t` the learning rates:

    z <- z - lr_t sign(g)
    x <- x + c (z - x),  c = lr_t^2 / sum of lr_s^2 up to t

Where rows are kept at unit norm, each step normalises all three points: y because a pursuit selects
by it, x because it is the coder that is evaluated and saved, and z so that a step turns every row
by the same angle however long the training has run.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.kernels.unit_norm import normalise_rows_

BETA = 0.95  # as in sparsify; 0.9 in the paper


class ScheduleFreeSignSGD(torch.optim.Optimizer):
    """State of a parameter: `z`, `x`, and `lr_squares`, the sum of squared rates so far."""

    def __init__(self, parameters: Iterable[dict[str, Any]], lr: float) -> None:
        """`parameters` are torch's groups, each with a bool `unit_norm` for rows of unit norm."""
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. Does not wait for the device."""
        assert closure is None, "gradients are computed before the step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move_(parameter, group["lr"], group["unit_norm"])

    def _move_(self, y: nn.Parameter, lr: float, unit_norm: bool) -> None:
        state = self.state[y]
        if not state:
            state["z"], state["x"] = y.detach().clone(), y.detach().clone()
            state["lr_squares"] = torch.zeros((), dtype=torch.float64, device=y.device)
        z, x, lr_squares = state["z"], state["x"], state["lr_squares"]
        assert y.grad is not None
        z.sub_(y.grad.sign(), alpha=lr)
        _normalise_if_(z, unit_norm)
        lr_squares += lr**2
        x.lerp_(z, (lr**2 / lr_squares).to(x.dtype))
        _normalise_if_(x, unit_norm)
        torch.lerp(z, x, BETA, out=y)
        _normalise_if_(y, unit_norm)

    def average(self, parameter: Tensor) -> Tensor:
        """Return x of a parameter: the live tensor; the parameter before its first step."""
        average: Tensor = self.state.get(parameter, {}).get("x", parameter)
        return average


def _normalise_if_(rows: Tensor, unit_norm: bool) -> None:
    if unit_norm:
        normalise_rows_(rows)
