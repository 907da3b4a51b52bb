"""Schedule and optimizers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptrain.coder import Coder
from mptrain.optimize import Optimizers, lr_factor, make_optimizers, peak_lr
from mptrain.recipe import CoderConfig, Optimizer


def make_coder(optimizer: Optimizer = "muon", lr: float | None = None) -> Coder:
    config = CoderConfig(
        hookpoint="h",
        kind="skip-transcoder",
        arch="mp",
        k=2,
        expansion=4,
        optimizer=optimizer,
        lr=lr,
        warmup_share=0.25,
    )
    coder = Coder(config, 4, 3)
    coder.initialise_(torch.zeros(4), torch.zeros(3), torch.Generator().manual_seed(0))
    return coder


def fill_gradients_(coder: Coder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in coder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train_(coder: Coder, optimizers: Optimizers, steps: int) -> None:
    for _ in range(steps):
        fill_gradients_(coder, optimizers.steps_done)
        optimizers.step_()


@given(st.integers(1, 300), st.floats(0, 1))
def test_schedule_rises_to_one_and_falls_towards_zero(steps: int, warmup_share: float):
    factors = [lr_factor(step, steps, warmup_share) for step in range(steps)]
    peak = factors.index(max(factors))
    assert factors[peak] == pytest.approx(1)
    assert min(factors) > 0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert lr_factor(steps, steps, warmup_share) == 0
    assert abs(peak - min(warmup_share * steps, steps - 1)) <= 1


def test_default_learning_rates():
    assert peak_lr(make_coder("muon").config, 1 << 16) == 2e-3
    assert peak_lr(make_coder("adam").config, 1 << 16) == pytest.approx(1e-4)
    assert peak_lr(make_coder("adam", lr=0.5).config, 1 << 16) == 0.5


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_learning_rate_follows_the_schedule(optimizer: Optimizer):
    coder = make_coder(optimizer, lr=0.1)
    optimizers = make_optimizers(coder, coder.config, 8)
    seen = []
    for _ in range(8):
        seen.append(optimizers.lr)
        train_(coder, optimizers, 1)
    assert seen == pytest.approx([0.1 * lr_factor(step, 8, 0.25) for step in range(8)])


def test_adam_moves_vectors_alike_and_muon_equalises_matrices():
    adam, muon = make_coder("adam", lr=1e-3), make_coder("muon", lr=1e-3)
    for coder in (adam, muon):
        train_(coder, make_optimizers(coder, coder.config, 1), 1)
    torch.testing.assert_close(adam.b_D, muon.b_D)
    assert adam.V_ME is not None
    assert muon.V_ME is not None
    torch.testing.assert_close(adam.V_ME.abs(), torch.full((16, 3), 1e-3), atol=1e-7, rtol=1e-3)
    singular = torch.linalg.svdvals(muon.V_ME.detach()) / (1e-3 * 0.2 * math.sqrt(16))
    assert ((singular > 0.4) & (singular < 1.5)).all(), "Newton-Schulz, RMS matched to AdamW"


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("before", [0, 3])
def test_continues_bit_for_bit(optimizer: Optimizer, before: int):
    whole = make_coder(optimizer)
    train_(whole, make_optimizers(whole, whole.config, 8), 8)

    first = make_coder(optimizer)
    optimizers = make_optimizers(first, first.config, 8)
    train_(first, optimizers, before)
    saved = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    second = make_coder(optimizer)
    second.load_state_dict(first.state_dict())
    resumed = make_optimizers(second, second.config, 8)
    train_(make_coder(optimizer), resumed, 0)
    resumed.load_state_tensors_(saved)
    train_(second, resumed, 8 - before)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_copies():
    coder = make_coder("adam")
    optimizers = make_optimizers(coder, coder.config, 8)
    train_(coder, optimizers, 2)
    saved = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    optimizers.load_state_tensors_(saved)
    train_(coder, optimizers, 2)
    for name, tensor in kept.items():
        assert torch.equal(tensor, saved[name])


def test_refuses_the_state_of_another_coder():
    coder = make_coder()
    optimizers = make_optimizers(coder, coder.config, 8)
    with pytest.raises(ValueError, match=r"holds encoder_MD.exp_avg, the coder has b_D"):
        optimizers.load_state_tensors_(
            {"steps_done": torch.tensor(1), "encoder_MD.exp_avg": torch.zeros(1)}
        )
