"""Schedule and optimizers."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Optimizer, Schedule
from mptrain.training.optimizers import Optimizers, lr_factor
from tests.helpers.trainers import optimizers_of


def make_coder(
    optimizer: Optimizer = "muon", lr: float | None = None, clip_norm: float | None = None
) -> Coder:
    config = CoderConfig(
        inputs=("h:output",),
        targets=("h:output",),
        kind="skip-transcoder",
        arch="mp",
        k=2,
        expansion=4,
        optimizer=optimizer,
        lr=lr,
        warmup_share=0.25,
        clip_norm=clip_norm,
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


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from(["linear", "cosine"]), st.floats(0, 1))
def test_schedule_rises_to_one_and_falls_towards_zero(
    steps: int, warmup_share: float, schedule: Schedule, decay_share: float
):
    plan = (warmup_share, schedule, decay_share)
    factors = [lr_factor(step, steps, *plan) for step in range(steps)]
    peak = factors.index(max(factors))
    assert factors[peak] == pytest.approx(1)
    assert min(factors) > 0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert lr_factor(steps, steps, *plan) == 0
    assert sum(factor < 1 for factor in factors[peak:]) <= decay_share * steps
    assert abs(peak - min(warmup_share * steps, steps - 1)) <= 1


def test_a_cosine_stays_high_and_a_constant_stays():
    steps = range(20)
    linear, cosine, constant = (
        [lr_factor(step, 20, 0.1, schedule, 0.5) for step in steps]
        for schedule in get_args(Schedule)
    )
    assert cosine[2:11] == linear[2:11] == [1.0] * 9
    assert all(a > b for a, b in zip(cosine[11:15], linear[11:15], strict=True))
    assert all(a < b for a, b in zip(cosine[16:], linear[16:], strict=True))
    assert cosine[15] == pytest.approx(0.5)
    assert constant == [1 / 3, 2 / 3] + [1.0] * 18


def test_large_gradients_are_scaled_down_to_the_clip_norm():
    free, loose, tight = (
        make_coder("adam", clip_norm=clip_norm) for clip_norm in (None, 100.0, 0.5)
    )
    moments = {}
    for coder in (free, loose, tight):
        optimizers = optimizers_of(coder, coder.config, 8)
        train_(coder, optimizers, 1)
        moments[coder.config.clip_norm] = {
            name: tensor
            for name, tensor in optimizers.state_tensors().items()
            if name.endswith("exp_avg")
        }
    norm = torch.stack([m.norm() for m in moments[None].values()]).norm() / 0.1
    assert 0.5 < norm < 100
    for name, moment in moments[None].items():
        assert torch.equal(moment, moments[100.0][name])
        torch.testing.assert_close(moments[0.5][name], moment * (0.5 / norm))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_learning_rate_follows_the_schedule(optimizer: Optimizer):
    coder = make_coder(optimizer, lr=0.1)
    optimizers = optimizers_of(coder, coder.config, 8)
    seen = []
    for _ in range(8):
        seen.append(optimizers.lr)
        train_(coder, optimizers, 1)
    assert seen == pytest.approx([0.1 * lr_factor(step, 8, 0.25) for step in range(8)])


def test_adam_moves_vectors_alike_and_muon_equalises_matrices():
    adam, muon = make_coder("adam", lr=1e-3), make_coder("muon", lr=1e-3)
    for coder in (adam, muon):
        train_(coder, optimizers_of(coder, coder.config, 1), 1)
    torch.testing.assert_close(adam.b_D, muon.b_D)
    assert adam.decoder.V_ME is not None
    assert muon.decoder.V_ME is not None
    torch.testing.assert_close(
        adam.decoder.V_ME.abs(), torch.full((16, 3), 1e-3), atol=1e-7, rtol=1e-3
    )
    singular = torch.linalg.svdvals(muon.decoder.V_ME.detach()) / (1e-3 * 0.2 * math.sqrt(16))
    assert ((singular > 0.4) & (singular < 1.5)).all(), "Newton-Schulz, RMS matched to AdamW"


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("before", [0, 3])
def test_continues_bit_for_bit(optimizer: Optimizer, before: int):
    uninterrupted = make_coder(optimizer)
    train_(uninterrupted, optimizers_of(uninterrupted, uninterrupted.config, 8), 8)

    first = make_coder(optimizer)
    optimizers = optimizers_of(first, first.config, 8)
    train_(first, optimizers, before)
    saved = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    second = make_coder(optimizer)
    second.load_state_dict(first.state_dict())
    resumed = optimizers_of(second, second.config, 8)
    train_(make_coder(optimizer), resumed, 0)
    resumed.load_state_tensors_(saved)
    train_(second, resumed, 8 - before)
    for a, b in zip(uninterrupted.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_copies():
    coder = make_coder("adam")
    optimizers = optimizers_of(coder, coder.config, 8)
    train_(coder, optimizers, 2)
    saved = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    optimizers.load_state_tensors_(saved)
    train_(coder, optimizers, 2)
    for name, tensor in kept.items():
        assert torch.equal(tensor, saved[name])


def test_refuses_the_state_of_another_coder():
    coder = make_coder()
    optimizers = optimizers_of(coder, coder.config, 8)
    with pytest.raises(ValueError, match=r"holds encoder_MD.exp_avg, but this coder has only b_D"):
        optimizers.load_state_tensors_(
            {"steps_done": torch.tensor(1), "encoder_MD.exp_avg": torch.zeros(1)}
        )
