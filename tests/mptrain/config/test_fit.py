"""Which settings apply to which coder of a grid, and which are refused."""

from typing import Any

import pytest

from mptrain.config.coder import CoderConfig
from mptrain.config.coder_grid import FitConfig
from mptrain.config.presets import PRESETS

BEGINS = {"begin_as": "topk", "begin_share": 0.5}
BLOCKS = {"blocks": "both", "kind": ("transcoder",)}


def config(**changes: Any) -> FitConfig:
    return FitConfig(store="s", run="r", hookpoints=("h",), k=(4,), **changes)


def test_the_grid_gives_each_coder_what_is_for_it():
    """A setting that does not apply to a coder is in neither its config nor its name."""
    kinds = ("sae", "transcoder")
    names = [c.name for c in config(kind=kinds, detach=True, input_loss=0.5, lr=(1.0,)).coders()]
    assert names == [
        "h-sae-mp-k4-x64-seed0-lr1-detach",
        "h-sae-topk-k4-x64-seed0-lr1",
        "h-transcoder-mp-k4-x64-seed0-lr1-detach-input-loss0.5",
        "h-transcoder-topk-k4-x64-seed0-lr1",
    ]


def test_learning_rates_and_sizes_are_axes_of_the_grid():
    names = [c.name for c in config(arch=("mp",), latents=(8, 16), lr=(1e-3, 1e-2)).coders()]
    assert names == [
        "h-sae-mp-k4-latents8-seed0-lr0.001",
        "h-sae-mp-k4-latents8-seed0-lr0.01",
        "h-sae-mp-k4-latents16-seed0-lr0.001",
        "h-sae-mp-k4-latents16-seed0-lr0.01",
    ]


@pytest.mark.parametrize("changes", [{}, {"expansion": 2, "latents": 32}], ids=["neither", "both"])
def test_a_coder_has_one_number_of_latents(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="expansion and latents both set the number"):
        CoderConfig(
            inputs=("h:output",), targets=("h:output",), kind="sae", arch="mp", k=2, **changes
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": ("topk",), "detach": True}, "detach has no effect .*; it applies to mp,batch-mp"),
        ({"input_loss": 0.1}, "input_loss has no effect on kind=sae .* mp,batch-mp transcoders"),
        (
            {"shortlist_size": 8},
            "shortlist_size applies only to backend=shortlist, got backend=auto",
        ),
        ({"codes": "omp", "backend": "gram"}, "codes=omp needs backend=direct, got backend=gram"),
        ({"codes": "gp", "arch": ("batch-mp",)}, "codes has no effect on .* arch=batch-mp"),
        ({"codes": "gp", "detach": True}, "detach cannot be combined with codes=gp"),
        ({"codes": "gp", "per_step_loss": True}, "per_step_loss cannot be combined with codes=gp"),
        (
            {"nested": True, "per_step_loss": True},
            "nested and per_step_loss each change the loss; use only one",
        ),
        ({"multi_topk": True, "per_step_loss": True}, "each change the loss; use only one"),
        (
            {"arch": ("groupmax",), "multi_topk": True},
            "multi_topk has no effect .* applies to mp,topk",
        ),
        (
            {"score_dtype": "bfloat16"},
            "score_dtype applies only to backend=gram and backend=shortlist, got backend=auto",
        ),
        (
            {"optimizer": "signsgd", "clip_norm": 1.0},
            "clip_norm has no effect on optimizer=signsgd, which uses only signs",
        ),
        ({"schedule": "constant", "decay_share": 0.5}, "decay_share has no effect on schedule=con"),
        ({"optimizer": "signsgd", "decay_share": 0.5}, "use schedule=linear or schedule=cosine"),
        ({"start": "median", "bias": False}, "start=median needs a coder with biases"),
        ({"clip_norm": 0.0}, "clip_norm must be positive and finite, got 0.0"),
        ({"micro_batch_rows": 0}, "micro_batch_rows must be at least 1, got 0"),
        ({"decay_share": 1.5}, r"decay_share must be in \[0, 1\], got 1.5"),
        ({"subtract": "separate"}, "subtract=separate applies only to transcoders"),
        ({"begin_as": "topk"}, "begin_as and begin_share need each other"),
        ({"begin_share": 0.5}, "begin_as and begin_share need each other"),
        ({"k_factor": 2.0}, "k_factor and k_decay_share need each other"),
        ({"begin_as": "topk", "begin_share": 1.0}, r"begin_share must be in \[0, 1\)"),
        (BEGINS | {"per_step_loss": True}, "per_step_loss cannot be combined with begin_as=topk"),
        (BEGINS | {"codes": "gp"}, "codes cannot be combined with begin_as=topk"),
        (
            BEGINS | BLOCKS | {"blocks": "predicting"},
            "begin_as cannot be combined with blocks=predicting",
        ),
        (BLOCKS | {"backend": "gram"}, "blocks=both needs backend=direct, got backend=gram"),
        ({"blocks": "selecting"}, "blocks=selecting needs different rows in encoder and decoder"),
        ({"codes": "gp", "subtract": "predicting"}, "subtract cannot be combined with codes=gp"),
        ({"preset": ("none",)}, "preset must be one of paper, mp, .*, got none"),
        ({"preset": ("detach",), "detach": True}, "preset=detach already sets detach; remove one"),
        (
            {"preset": ("detach",), "arch": ("topk",)},
            "preset=detach applies to no coder of kind=sae with",
        ),
        (
            {"preset": ("input-loss",)},
            "preset=input-loss applies to no coder of kind=sae with",
        ),
        (
            {"input_loss": -1.0, "kind": ("transcoder",)},
            "input_loss must be at least 0 and finite",
        ),
    ],
)
def test_refuses_what_would_have_no_effect(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_name_is_every_field_that_is_not_default():
    coder = CoderConfig(
        inputs=("h:output",),
        targets=("h:output",),
        kind="sae",
        arch="mp",
        k=2,
        expansion=3,
        tolerance=0.25,
    )
    assert coder.name == "h-sae-mp-k2-x3-seed0-tolerance0.25"


def test_presets_are_variants_of_the_mp_coders():
    """One coder for each preset, beside the coders without a preset."""
    names = [coder.name for coder in config(preset=("mp", "paper", "detach")).coders()]
    assert names == [
        "h-sae-mp-k4-x64-seed0",
        "h-sae-mp-k4-x64-seed0-select-signed-no-bias",
        "h-sae-mp-k4-x64-seed0-detach",
        "h-sae-topk-k4-x64-seed0",
    ]


def test_presets_go_to_the_kinds_that_they_are_for():
    both = config(preset=("mp", "input-loss", "sliced-selecting"), kind=("sae", "transcoder"))
    assert [(coder.kind, coder.arch) for coder in both.coders()].count(("sae", "mp")) == 1
    assert [(coder.kind, coder.arch) for coder in both.coders()].count(("transcoder", "mp")) == 3


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_for_a_transcoder(name: str):
    (coder,) = config(preset=(name,), kind=("transcoder",), arch=("mp",)).coders()
    assert {field: getattr(coder, field) for field in PRESETS[name]} == PRESETS[name]
