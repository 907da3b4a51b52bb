"""Schedule-free SignSGD: its three points, their norm, and the coder that is evaluated."""

from dataclasses import replace

import pytest
import torch

from mptrain.config.coder import CoderConfig
from mptrain.training.schedule_free_signsgd import BETA, ScheduleFreeSignSGD
from tests.helpers.trainers import BASE, TRANSCODER, make_learner, rows_of, train_

SIGN = replace(BASE, optimizer="signsgd", lr=2e-2)
ONE_ULP = torch.finfo(torch.float32).eps


def test_points_are_those_of_the_paper():
    """In float64: x is the mean of all z by squared learning rates, y lies between z and x."""
    generator = torch.Generator().manual_seed(0)
    start, grads = (torch.randn(n, 5, 3, generator=generator, dtype=torch.float64) for n in (1, 6))
    parameter = torch.nn.Parameter(start[0].clone())
    optimizer = ScheduleFreeSignSGD([{"params": [parameter], "unit_norm": False}], 1.0)
    lrs, z, zs = [0.1, 0.2, 0.3, 0.3, 0.2, 0.05], start[0], []
    for lr, grad in zip(lrs, grads, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = grad
        optimizer.step()
        z = z - lr * grad.sign()
        zs.append(z)
        weights = torch.tensor(lrs[: len(zs)], dtype=torch.float64) ** 2
        x = torch.einsum("t,tmd->md", weights / weights.sum(), torch.stack(zs))
        torch.testing.assert_close(optimizer.average(parameter), x, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(parameter.detach(), (1 - BETA) * z + BETA * x, atol=1e-7, rtol=0)


def test_what_has_no_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = ScheduleFreeSignSGD([{"params": [parameter], "unit_norm": True}], 1.0)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 2))
    assert optimizer.average(parameter) is parameter


@pytest.mark.parametrize("config", [SIGN, replace(SIGN, kind="transcoder", subtract="separate")])
def test_all_points_of_atoms_keep_unit_norm(config: CoderConfig):
    trainer = make_learner(config)
    train_(trainer, 0, 30)
    state = trainer.optimizers.state_tensors()
    for name in trainer.coder.unit_norm:
        points = (trainer.coder.get_parameter(name), state[f"{name}.z"], state[f"{name}.x"])
        for rows in points:
            norm_M = rows.detach().double().norm(dim=1)
            torch.testing.assert_close(norm_M, torch.ones_like(norm_M), atol=2 * ONE_ULP, rtol=0)


def test_the_average_is_evaluated_and_the_training_does_not_notice():
    plain, observed = make_learner(SIGN), make_learner(SIGN)
    x_BD, _ = rows_of(SIGN, 64, 99)
    for step in range(20):
        train_(plain, step, step + 1)
        with torch.no_grad():
            observed.evaluated()(x_BD)
        train_(observed, step, step + 1)
    state = observed.state_tensors()
    for name, tensor in plain.state_tensors().items():
        assert torch.equal(tensor, state[name]), name
    for name, tensor in observed.evaluated().state_dict().items():
        assert tensor.data_ptr() == state[f"optimizer.{name}.x"].data_ptr(), "no copy"
        assert not torch.equal(tensor, observed.coder.state_dict()[name])


@pytest.mark.parametrize("base", [BASE, TRANSCODER, replace(BASE, arch="topk")])
def test_trains_without_a_falling_learning_rate(base: CoderConfig):
    """The average point ends with a lower loss than the last point."""
    trainer = make_learner(replace(base, optimizer="signsgd", lr=3e-2))
    losses = train_(trainer, 0, 100)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert trainer.optimizers.lr == 3e-2
    x_BD, y_BE = rows_of(base, 500, 999)
    left = {}
    state = trainer.optimizers.state_tensors()
    for point in "xz":
        coder = trainer.evaluated()
        coder.load_state_dict(
            {n: state[f"{n}.{point}"].detach() for n in coder.state_dict()}, assign=True
        )
        with torch.no_grad():
            left[point] = float((coder(x_BD) - y_BE).square().sum())
    assert left["x"] < left["z"]
