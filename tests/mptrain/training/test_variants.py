"""Every variant learns, continues, has the right gradient, and differs from the others."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mptrain.coders.fvu import reconstruction_loss
from mptrain.config.architectures import ARCHITECTURES, architectures_with
from mptrain.config.coder import CoderConfig, is_compatible
from mptrain.config.coder_settings import CoderSettings
from mptrain.config.presets import PRESETS
from mptrain.training.schedules import coded_as, k_at
from mptrain.training.train_step import CoderTrainer
from tests.helpers import reference
from tests.helpers.trainers import BASE, STEPS, TRANSCODER, D, make_learner, rows_of, train_

M = 3 * D
SKIP = replace(BASE, kind="skip-transcoder")
SHORT = replace(BASE, backend="shortlist", shortlist_size=2, shortlist_refresh=3)
WIDE = replace(BASE, k=20, expansion=20)
DEAD = replace(BASE, dead_rows=1)
TOPK = replace(BASE, arch="topk")
BATCH = replace(BASE, arch="batch-mp")
SEPARATE = replace(TRANSCODER, subtract="separate")
PREDICTING = replace(BASE, subtract="predicting")
FROM_TOPK = replace(BASE, begin_as="topk", begin_share=0.05)
DECAY = replace(BASE, k_factor=3.0, k_decay_share=0.5)
ADAM = replace(BASE, optimizer="adam")
SIGN = replace(BASE, optimizer="signsgd")

VARIANTS = [
    replace(base, **PRESETS[name])
    for name in PRESETS
    for base in (BASE, TRANSCODER)
    if is_compatible(PRESETS[name], base.kind, base.arch)
]
VARIANTS += [
    replace(SEPARATE, blocks="predicting"),
    replace(SEPARATE, select="signed", kind="skip-transcoder"),
    replace(PREDICTING, blocks="selecting"),
    replace(PREDICTING, blocks="predicting"),
    replace(PREDICTING, blocks="both", per_step_loss=True),
    replace(PREDICTING, select="magnitude", backend="gram"),
    replace(TRANSCODER, subtract="predicting", input_loss=0.5),
    replace(TRANSCODER, blocks="both", input_loss=0.5, select="magnitude"),
    replace(BASE, multi_topk=True, select="magnitude"),
    replace(BASE, multi_topk=True),
    replace(TOPK, multi_topk=True),
    replace(SKIP, multi_topk=True),
    replace(BATCH, select="signed"),
    replace(BATCH, select="magnitude"),
    replace(BATCH, bias=False, free_norm=True),
    replace(TRANSCODER, bias=False),
    replace(BASE, free_norm=True, codes="omp"),
    replace(BASE, select="magnitude", codes="omp"),
    replace(FROM_TOPK, begin_as="groupmax", blocks="both"),
    replace(SEPARATE, begin_as="topk", begin_share=0.05),
    replace(TOPK, k_factor=2.0, k_decay_share=1.0),
    replace(TOPK, score_dtype="bfloat16"),
    SIGN,
    replace(BATCH, kind="transcoder", optimizer="signsgd", normalise=True),
    replace(
        TRANSCODER, schedule="cosine", decay_share=0.5, clip_norm=1.0, micro_batch_rows=20,
        start="median", normalise=True,
    ),
]  # fmt: skip


def by_name(value: object) -> str:
    return value.name if isinstance(value, CoderConfig) else str(value)


@pytest.mark.parametrize("config", [c for c in VARIANTS if c.k_factor == 1], ids=by_name)
def test_learns_and_keeps_unit_norm(config: CoderConfig):
    config = replace(config, lr=2e-2)
    trainer = make_learner(config)
    losses = train_(trainer, 0, STEPS)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    for name in trainer.coder.unit_norm:
        norm_M = trainer.coder.get_parameter(name).norm(dim=1)
        torch.testing.assert_close(norm_M, torch.ones_like(norm_M), atol=3e-7, rtol=0)


@pytest.mark.parametrize("config", VARIANTS, ids=by_name)
def test_continues_bit_for_bit(config: CoderConfig):
    config = replace(config, dead_rows=200)
    uninterrupted, first, second = (make_learner(config) for _ in range(3))
    losses = train_(uninterrupted, 0, 9)
    train_(first, 0, 3)
    second.load_state_tensors_({n: t.clone() for n, t in first.state_tensors().items()})
    assert second.coder.encoder.coded_as == first.coder.encoder.coded_as
    assert train_(second, 3, 9) == losses[3:]


@pytest.mark.parametrize(
    "config", [c for c in VARIANTS if not c.detach and c.begin_as == "mp"], ids=by_name
)
def test_gradient_is_the_slope_of_the_loss(config: CoderConfig):
    """Along a random direction of all parameters, in float64; the choice of atoms does not move."""
    trainer = make_learner(replace(config, auxk_alpha=0.0))
    train_(trainer, 0, 5)  # a transcoder's decoder has left its zeros
    coder = trainer.coder.double()
    x_BD, y_BE = (t.double() for t in rows_of(config, 16, 9))
    trained = {name: p for name, p in coder.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in trained.items()
    }

    def loss_at(step: float) -> Tensor:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.add_(direction[name], alpha=step)
        return loss_of(trainer, x_BD, y_BE)

    loss_at(0.0).backward()
    slope = sum(
        float((p.grad * direction[n]).sum()) for n, p in trained.items() if p.grad is not None
    )
    eps = 1e-7
    with torch.no_grad():
        rise = float(loss_at(eps) - loss_at(-2 * eps)) / (2 * eps)
    assert abs(slope) > 1e-4
    assert slope == pytest.approx(rise, rel=1e-4)


def loss_of(trainer: CoderTrainer, x_BD: Tensor, y_BE: Tensor) -> Tensor:
    coder, k = trainer.coder, trainer.coder.config.k
    code = coder.encode(x_BD, k, over_batch=True)
    dead_M = torch.zeros(M, dtype=torch.bool)
    loss = trainer.objective.loss(code, x_BD, y_BE, coder.predict(code, x_BD), dead_M)
    if coder.config.multi_topk:
        wide = coder.encode(x_BD, min(4 * k, M), over_batch=True)
        loss = loss + trainer.objective.wide_loss(wide, x_BD, y_BE)
    return loss


@pytest.mark.parametrize("config", VARIANTS, ids=by_name)
def test_prediction_is_that_of_the_code(config: CoderConfig):
    """`predict` may take a short cut, and equals the sum over latents of the code."""
    trainer = make_learner(config)
    train_(trainer, 0, 6)
    coder, (x_BD, _) = trainer.coder, rows_of(config, 30, 9)
    with torch.no_grad():
        code = coder.encode(x_BD)
        rows_M = torch.arange(M) % len(coder.decoder_ME)
        code_BM = reference.dense(code.idx_BK, code.val_BK, M)
        expected_BE = code_BM @ coder.decoder_ME[rows_M] + coder.decode_offset(x_BD)
        torch.testing.assert_close(coder.predict(code, x_BD), expected_BE, atol=2e-4, rtol=2e-4)


CASES: dict[str, list[tuple[CoderConfig, Any]]] = {
    "optimizer": [(BASE, "adam"), (BASE, "signsgd")],
    "lr": [(BASE, 2e-2), (BASE, None)],
    "warmup_share": [(BASE, 0.5), (SIGN, 0.5)],
    "schedule": [(BASE, "cosine"), (BASE, "constant"), (SIGN, "linear"), (SIGN, "cosine")],
    "decay_share": [(BASE, 0.5), (replace(SIGN, schedule="cosine"), 0.5)],
    "clip_norm": [(BASE, 1e-2), (ADAM, 1e-2)],
    "micro_batch_rows": [(BASE, 20), (BATCH, 20), (replace(BATCH, arch="batch-topk"), 20)],
    "start": [(BASE, "median"), (TRANSCODER, "median"), (TOPK, "median")],
    "normalise": [(BASE, True), (TRANSCODER, True), (TOPK, True)],
    "codes": [(BASE, "gp"), (BASE, "omp"), (TRANSCODER, "omp")],
    "backend": [(WIDE, "shortlist")],
    "shortlist_size": [(SHORT, 30)],
    "shortlist_refresh": [(SHORT, 1)],
    "score_dtype": [
        (SHORT, "bfloat16"), (replace(WIDE, backend="gram"), "bfloat16"),
        (replace(TOPK, k=20, expansion=20), "bfloat16"),
    ],
    "tolerance": [(BASE, 0.5), (PREDICTING, 0.5)],
    "select": [(BASE, "magnitude"), (PREDICTING, "magnitude")],
    "subtract": [(BASE, "predicting"), (TRANSCODER, "separate"), (TRANSCODER, "predicting")],
    "blocks": [
        (BASE, "both"), (TRANSCODER, "both"), (TRANSCODER, "selecting"),
        (TRANSCODER, "predicting"), (PREDICTING, "selecting"), (PREDICTING, "predicting"),
    ],
    "free_norm": [(BASE, True), (TRANSCODER, True)],
    "bias": [(BASE, False), (TRANSCODER, False)],
    "detach": [(BASE, True), (TRANSCODER, True), (BATCH, True), (PREDICTING, True)],
    "per_step_loss": [(BASE, True), (TRANSCODER, True)],
    "nested": [(BASE, True), (TOPK, True), (replace(BASE, blocks="both"), True)],
    "multi_topk": [(BASE, True), (TOPK, True)],
    "input_loss": [(TRANSCODER, 1.0), (SEPARATE, 1.0)],
    "auxk_alpha": [(DEAD, 0.0), (replace(DEAD, arch="topk"), 0.0), (replace(DEAD, k=4), 0.5)],
    "dead_rows": [(DEAD, 1000), (replace(DEAD, arch="topk"), 1000)],
    "begin_as": [(FROM_TOPK, "groupmax")],
    "begin_share": [(FROM_TOPK, 0.01)],
    "k_factor": [(DECAY, 2.0)],
    "k_decay_share": [(DECAY, 0.05)],
    "kind": [(BASE, "transcoder"), (TRANSCODER, "skip-transcoder")],
    "arch": [
        (BASE, "topk"), (BASE, "batch-mp"), (TOPK, "batch-topk"), (TOPK, "groupmax"),
    ],
    "k": [(BASE, 4), (BATCH, 4), (TOPK, 4)],
    "expansion": [(BASE, 4)],
    "latents": [(replace(BASE, expansion=None, latents=36), 48)],
    "seed": [(BASE, 1)],
}  # fmt: skip


def test_every_field_has_a_case():
    """The sides are exempt: they name data. A new field without a case fails here."""
    names = [field.name for field in fields(CoderSettings)]
    own = {name for name in names if not is_of_encoder(name) and not has_module(name)}
    plain = {field.name for field in fields(CoderConfig)} - {f.name for f in fields(CoderSettings)}
    assert CASES.keys() == (own | plain) - {"inputs", "targets"}


def has_module(name: str) -> bool:
    """Whether an option of pursuits has a test module of its own."""
    return (Path(__file__).parents[1] / "pursuit" / f"test_{name}.py").exists()


def is_of_encoder(name: str) -> bool:
    """Whether an option is only for architectures without K; tests of their encoders cover it."""
    return not any(ARCHITECTURES[arch].needs_k for arch in architectures_with(name))


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [(base, name, value) for name, cases in CASES.items() for base, value in cases],
    ids=by_name,
)
def test_every_field_changes_the_training(base: CoderConfig, name: str, value: Any):
    a, b = make_learner(base), make_learner(replace(base, **{name: value}))
    assert train_(a, 0, 8) != train_(b, 0, 8)


def test_schedules():
    """The schedules of K and of the starting encoder end at the configured values."""
    config = replace(FROM_TOPK, begin_share=0.3)
    assert [coded_as(config, step, 10) for step in (0, 2, 3, 9)] == ["topk", "topk", "mp", "mp"]
    assert [k_at(DECAY, step, 20) for step in (0, 5, 9, 10, 19)] == [9, 6, 4, 3, 3]
    assert [k_at(BASE, step, 20) for step in (0, 19)] == [3, 3]


@pytest.mark.parametrize("begin_as", ["topk", "groupmax"])
def test_begins_as_a_tied_linear_coder(begin_as: str):
    """The code first comes from a linear encoder without biases, at last from a pursuit."""
    trainer = make_learner(replace(BASE, begin_as=begin_as, begin_share=0.05))
    x_BD, _ = rows_of(BASE, 20, 1)
    with torch.no_grad():
        code = trainer.coder.encode(x_BD)
        pre_BM = ((x_BD - trainer.coder.b_D) @ trainer.coder.encoder.W_MD.T).relu()
        groups = pre_BM.unflatten(1, (3, M // 3) if begin_as == "groupmax" else (1, M))
        kept = groups.topk(1 if begin_as == "groupmax" else 3, dim=2).values[:, :, -1:]
        expected_BM = torch.where(groups >= kept, groups, 0).flatten(1)
        code_BM = reference.dense(code.idx_BK, code.val_BK, M)
    torch.testing.assert_close(code_BM, expected_BM)
    assert code.residual_BD is None
    train_(trainer, 0, 5)
    assert trainer.coder.encode(x_BD).residual_BD is not None


def test_wide_loss_is_that_of_more_steps():
    trainer, plain = make_learner(replace(BASE, multi_topk=True)), make_learner(BASE)
    x_BD, y_BE = rows_of(BASE, 64, 1)
    with torch.no_grad():
        wide = plain.coder.encode(x_BD, 12)
        variance = plain.objective.total_variance
        more = reconstruction_loss(y_BE, plain.coder.predict(wide, x_BD), variance) / 8
    losses = [float(learner.step(x_BD, y_BE).loss) for learner in (trainer, plain)]
    assert losses[0] - losses[1] == pytest.approx(float(more), rel=1e-4)


def test_codes_can_differ_at_inference():
    """Refitted values explain more of the same rows; meaningless combinations are refused."""
    coder = make_learner(replace(BASE, k=5)).coder
    x_BD, _ = rows_of(BASE, 200, 1)
    with torch.no_grad():
        left = [
            float(coder.encode(x_BD, codes=codes).residual_BD.square().sum())  # type: ignore[union-attr]
            for codes in ("mp", "gp", "omp")
        ]
    assert left[0] > left[1] > left[2]
    with pytest.raises(
        ValueError, match="codes=gp applies only to arch=mp, got a coder with arch=topk"
    ):
        make_learner(TOPK).coder.encode(x_BD, codes="gp")
    trained_otherwise = replace(BASE, detach=True, backend="gram", multi_topk=True)
    assert make_learner(trained_otherwise).coder.encode(x_BD, codes="omp").residual_BD is not None
    with pytest.raises(ValueError, match="subtract cannot be combined with codes=omp"):
        make_learner(PREDICTING).coder.encode(x_BD, codes="omp")


def test_signed_codes_rows_that_no_atom_points_to():
    """`signed` differs from the default only for rows that no atom points to."""
    config = replace(BASE, expansion=1, auxk_alpha=0.0)
    coders = [make_learner(c).coder for c in (config, replace(config, select="signed"))]
    x_BD = coders[0].b_D - coders[0].encoder.W_MD.sum(0, keepdim=True)
    codes = [coder.encode(x_BD.detach()) for coder in coders]
    assert (coders[0].encoder.W_MD.sum(0) @ coders[0].encoder.W_MD.T > 0).all(), "all point away"
    assert (codes[0].idx_BK == -1).all()
    assert (codes[1].val_BK[:, 0] < 0).all()


def test_blocks_give_each_step_its_own_latents():
    trainer = make_learner(replace(TRANSCODER, blocks="selecting"))
    x_BD, _ = rows_of(TRANSCODER, 50, 1)
    coder = trainer.coder
    code = coder.encode(x_BD)
    assert torch.equal(code.idx_BK // D, torch.arange(3).expand(50, 3))
    assert coder.decoder.V_ME is not None
    assert len(coder.decoder.V_ME) == D, "the predicting rows are shared"
    assert torch.equal(coder.encode(x_BD, 2).idx_BK, code.idx_BK[:, :2])
    with torch.no_grad():
        coder.encoder.W_MD[D : 2 * D] = torch.eye(D)[0]
        away_BD = (coder.b_D - 10 * torch.eye(D)[0])[None]
        three, two = coder.encode(away_BD), coder.encode(away_BD, 2)
    assert three.idx_BK[0, 1] == -1 < three.idx_BK[0, 2], "a block without a match is left out"
    assert torch.equal(three.idx_BK[:, :2], two.idx_BK)
    with pytest.raises(ValueError, match="k must be at most the number of blocks, 3, got 4"):
        coder.encode(x_BD, 4)
    with pytest.raises(ValueError, match="k must divide the number of latents for blocks"):
        make_learner(replace(TRANSCODER, blocks="both", k=5))


def test_free_dictionaries_leave_unit_norm():
    trainer = make_learner(replace(BASE, free_norm=True))
    train_(trainer, 0, 20)
    norm_M = trainer.coder.encoder.W_MD.norm(dim=1)
    assert (norm_M - 1).abs().max() > 1e-2
