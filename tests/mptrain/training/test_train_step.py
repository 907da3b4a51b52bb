"""Train steps: what they reduce, keep, count and continue."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mptrain.coders.code import Code
from mptrain.coders.coder import Coder
from mptrain.coders.fvu import batch_fvu, reconstruction_loss
from mptrain.config.architectures import Arch
from mptrain.config.coder import CoderConfig, Kind
from mptrain.config.coder_settings import Optimizer
from mptrain.training.train_step import CoderTrainer
from tests.helpers import reference
from tests.helpers.trainers import BASE, STEPS, TRANSCODER, D, make_learner, rows_of, train_

KINDS: tuple[Kind, ...] = ("sae", "transcoder", "skip-transcoder")
ARCHS: tuple[Arch, ...] = ("mp", "batch-mp", "topk", "batch-topk", "groupmax")
SHORT = replace(BASE, backend="shortlist", shortlist_size=2, shortlist_refresh=3)


def copied(trainer: CoderTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}


GRID = [
    replace(BASE, kind=kind, arch=arch, optimizer=optimizer, lr=lr)
    for kind, arch, (optimizer, lr) in itertools.product(
        KINDS, ARCHS, (("adam", 1e-2), ("muon", 5e-2))
    )
]
GRID += [replace(BASE, kind=kind, codes=codes) for kind in KINDS for codes in ("gp", "omp")]


@pytest.mark.parametrize("config", GRID, ids=lambda config: config.name)
def test_training_reduces_the_loss_and_keeps_unit_norm(config: CoderConfig):
    trainer = make_learner(config)
    losses = train_(trainer, 0, 3)
    for name in trainer.coder.unit_norm:
        norm_M = trainer.coder.get_parameter(name).norm(dim=1)
        torch.testing.assert_close(norm_M, torch.ones_like(norm_M), atol=3e-7, rtol=0)
    losses += train_(trainer, 3, STEPS)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(parameter.grad is None for parameter in trainer.coder.parameters())


@pytest.mark.parametrize("config", GRID, ids=lambda config: config.name)
def test_continues_bit_for_bit(config: CoderConfig):
    config = replace(config, dead_rows=200)
    uninterrupted, first, second = (make_learner(config) for _ in range(3))
    losses = train_(uninterrupted, 0, 12)
    train_(first, 0, 7)
    second.load_state_tensors_(copied(first))
    assert train_(second, 7, 12) == losses[7:]
    for name, tensor in second.state_tensors().items():
        assert torch.equal(tensor, uninterrupted.state_tensors()[name]), name


@pytest.mark.parametrize("arch", ARCHS)
def test_observers_do_not_act(arch: Arch):
    plain, observed = make_learner(replace(BASE, arch=arch)), make_learner(replace(BASE, arch=arch))
    for step in range(4):
        x_BD, _ = rows_of(BASE, 64, step)
        plain.step(x_BD, x_BD)
        result = observed.step(x_BD, x_BD)
        float(result.fvu), float(result.l0), float(observed.usage.dead_share(10)), copied(observed)
        with torch.no_grad():
            observed.coder(x_BD)
    for name, tensor in plain.state_tensors().items():
        assert torch.equal(tensor, observed.state_tensors()[name]), name


def test_counts_rows_since_a_latent_fired():
    trainer = make_learner(BASE)
    x_BD, _ = rows_of(BASE, 5, 1)
    result = trainer.step(x_BD, x_BD)
    fired = set(result.codes[0].idx_BK[result.codes[0].val_BK > 0].tolist())
    expected = [0 if latent in fired else 5 for latent in range(3 * D)]
    assert trainer.usage.rows_since_fired_M.tolist() == expected
    assert float(trainer.usage.dead_share(5)) == pytest.approx(1 - len(fired) / (3 * D))
    assert float(trainer.usage.dead_share(6)) == 0
    assert float(result.l0) == sum(len(set(row.tolist())) for row in result.codes[0].idx_BK) / 5


def test_a_row_without_code_fires_nothing():
    trainer = make_learner(BASE)
    at_bias_BD = trainer.coder.b_D.detach().expand(4, D).clone()
    trainer.step(at_bias_BD, at_bias_BD + 1)
    assert (trainer.usage.rows_since_fired_M == 4).all()


def test_a_non_finite_loss_shows():
    for config in (BASE, replace(BASE, arch="topk"), replace(BASE, kind="transcoder")):
        trainer = make_learner(config)
        x_BD, y_BE = rows_of(config, 8, 0)
        x_BD[3, 4] = torch.nan
        assert not trainer.step(x_BD, y_BE).loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_per_step_loss_is_the_mean_over_coders_of_fewer_steps(kind: Kind):
    """A prefix of a pursuit is the pursuit with a smaller K."""
    config = replace(BASE, kind=kind, per_step_loss=True)
    trainer = make_learner(config)
    train_(trainer, 0, 5)
    x_BD, y_BE = rows_of(config, 64, 9)
    with torch.no_grad():
        predictions = [trainer.coder.decode(trainer.coder.encode(x_BD, k), x_BD) for k in (1, 2, 3)]
        losses = [
            reconstruction_loss(y_BE, y, trainer.objective.total_variance) for y in predictions
        ]
    assert float(trainer.step(x_BD, y_BE).loss) == pytest.approx(float(sum(losses)) / 3, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_nested_loss_is_the_mean_over_first_latents(kind: Kind, arch: Arch):
    config = replace(BASE, kind=kind, arch=arch, nested=True)
    trainer = make_learner(config)
    train_(trainer, 0, 5)
    x_BD, y_BE = rows_of(config, 64, 9)
    losses = []
    with torch.no_grad():
        code = trainer.coder.encode(x_BD, over_batch=True)
        code_BM = reference.dense(code.idx_BK, code.val_BK, 3 * D)
        base_BE = trainer.coder.decode_offset(x_BD)
        for latents in (2, 9, 18, 36):
            y_hat_BE = code_BM[:, :latents] @ trainer.coder.decoder_ME[:latents] + base_BE
            losses.append(
                float(reconstruction_loss(y_BE, y_hat_BE, trainer.objective.total_variance))
            )
    assert losses[0] > losses[-1]
    expected = pytest.approx(sum(losses) / 4, rel=1e-4)
    assert float(trainer.step(x_BD, y_BE).loss) == expected


def test_nested_training_puts_what_matters_first():
    """The first quarter of the latents predicts better than a quarter trained among equals."""
    left = {}
    for nested in (False, True):
        trainer = make_learner(replace(BASE, nested=nested, optimizer="adam", lr=1e-2))
        train_(trainer, 0, STEPS)
        x_BD, _ = rows_of(BASE, 500, 9999)
        with torch.no_grad():
            code = trainer.coder.encode(x_BD)
            first = Code(code.idx_BK, code.val_BK * (code.idx_BK < 9), None)
            left[nested] = float(batch_fvu(x_BD, trainer.coder.decode(first, x_BD)))
    assert left[True] < 0.9 * left[False]


def test_input_loss_trains_the_pursuit_of_a_transcoder_whose_decoder_is_zero():
    """At the start a transcoder's code has no effect, so only this loss moves the dictionary."""
    losses = {}
    for weight in (0.0, 0.5):
        trainer = make_learner(replace(TRANSCODER, input_loss=weight, optimizer="adam"))
        before_MD = trainer.coder.encoder.W_MD.detach().clone()
        losses[weight] = train_(trainer, 0, 1)[0]
        assert torch.allclose(before_MD, trainer.coder.encoder.W_MD, atol=1e-6) == (weight == 0)
    x_BD, _ = rows_of(TRANSCODER, 64, 1)
    residual_BD = make_learner(TRANSCODER).coder.encode(x_BD).residual_BD
    assert residual_BD is not None
    left = residual_BD.detach().square().sum() / 64 / trainer.objective.input_variance
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * float(left), rel=1e-4)


def test_refuses_a_target_that_does_not_vary():
    trainer = make_learner(BASE)
    with pytest.raises(ValueError, match="total_variance must be positive, got 0"):
        CoderTrainer(trainer.coder, trainer.optimizers, 0.0, dead_rows=1)


STARTS = range(0, 300, 20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["mp", "topk"])
def test_auxk_revives_dead_latents(kind: Kind, arch: Arch):
    """Silent latents revive with the auxiliary loss, and not without it."""
    silent = {}
    for alpha in (0.0, BASE.auxk_alpha):
        config = replace(
            BASE, kind=kind, arch=arch, optimizer="adam", lr=1e-2, auxk_alpha=alpha, dead_rows=128
        )
        trainer = make_learner(config, steps=300)
        silence_half_(trainer.coder)
        shares = [train_(trainer, s, s + 20) and trainer.usage.dead_share(128) for s in STARTS]
        silent[alpha] = float(sum(shares))
    assert silent[BASE.auxk_alpha] < 0.7 * silent[0.0]


@torch.no_grad()
def silence_half_(coder: Coder) -> None:
    """Silence latents by a bias that no row overcomes, or by nearly equal atoms."""
    if not coder.config.architecture.is_pursuit:
        coder.encoder.bias_M[::2] = -1.0
    else:
        generator = torch.Generator().manual_seed(3)
        coder.encoder.W_MD[::2] = coder.encoder.W_MD[:1] + 0.01 * torch.randn(
            coder.encoder.W_MD[::2].shape, generator=generator
        )
        coder.normalise_()


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (BASE, {"kind": "transcoder"}),
        (TRANSCODER, {"kind": "skip-transcoder"}),
        (BASE, {"arch": "topk"}),
        (BASE, {"arch": "batch-mp"}),
        (replace(BASE, arch="topk"), {"arch": "batch-topk"}),
        (replace(BASE, arch="topk"), {"arch": "groupmax"}),
        (replace(BASE, arch="batch-mp"), {"detach": True}),
        (replace(BASE, arch="batch-mp"), {"k": 4}),
        (BASE, {"k": 4}),
        (BASE, {"expansion": 4}),
        (BASE, {"seed": 1}),
        (BASE, {"optimizer": "adam"}),
        (BASE, {"lr": 2e-2}),
        (BASE, {"warmup_share": 0.5}),
        (BASE, {"tolerance": 0.5}),
        (BASE, {"codes": "gp"}),
        (BASE, {"codes": "omp"}),
        (TRANSCODER, {"codes": "omp"}),
        (BASE, {"detach": True}),
        (TRANSCODER, {"detach": True}),
        (BASE, {"nested": True}),
        (replace(BASE, arch="topk"), {"nested": True}),
        (BASE, {"per_step_loss": True}),
        (TRANSCODER, {"per_step_loss": True}),
        (TRANSCODER, {"input_loss": 1.0}),
        (SHORT, {"shortlist_size": 30}),
        (SHORT, {"shortlist_refresh": 1}),
        (SHORT, {"score_dtype": "bfloat16"}),
        (replace(BASE, dead_rows=1), {"auxk_alpha": 0.0}),
        (replace(BASE, dead_rows=1), {"dead_rows": 1000}),
        (replace(BASE, arch="topk", dead_rows=1), {"auxk_alpha": 0.0}),
        (replace(BASE, arch="topk", dead_rows=1), {"dead_rows": 1000}),
    ],
    ids=lambda value: value.name if isinstance(value, CoderConfig) else str(value),
)
def test_every_field_changes_the_training(base: CoderConfig, change: dict[str, object]):
    """Exceptions: the sides, which name data, and `backend`, which changes rounding only."""
    a, b = make_learner(base), make_learner(replace(base, **change))
    assert train_(a, 0, 6) != train_(b, 0, 6)


def test_backend_changes_only_rounding():
    direct = train_(make_learner(replace(BASE, backend="direct")), 0, 20)
    gram = train_(make_learner(replace(BASE, backend="gram")), 0, 20)
    assert direct == pytest.approx(gram, rel=1e-3)
    auto = train_(make_learner(BASE), 0, 20)
    assert auto == gram, "as many latents as these call for gram"
    shortlist = train_(make_learner(replace(BASE, backend="shortlist")), 0, 20)
    assert direct == pytest.approx(shortlist, rel=1e-3), "a list of all latents"


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_companions_do_not_matter(optimizer: Optimizer):
    alone, first, second = (make_learner(replace(BASE, optimizer=optimizer)) for _ in range(3))
    losses = train_(alone, 0, 5)
    together = [train_(first, s, s + 1) + train_(second, s, s + 1) for s in range(5)]
    assert [pair[0] for pair in together] == losses
