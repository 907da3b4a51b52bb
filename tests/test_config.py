"""Which settings are for which coder of a grid, and what is refused."""

from typing import Any

import pytest

from mptrain.config import FitConfig
from mptrain.recipe import CoderConfig


def config(**changes: Any) -> FitConfig:
    return FitConfig(store="s", run="r", hookpoints=("h",), k=(4,), **changes)


def test_the_grid_gives_each_coder_what_is_for_it():
    """Settings that are not for a coder are in neither its config nor its name."""
    kinds = ("sae", "transcoder")
    names = [c.name for c in config(kind=kinds, detach=True, input_loss=0.5, lr=1.0).coders()]
    assert names == [
        "h-sae-mp-k4-x64-seed0-lr1-detach",
        "h-sae-topk-k4-x64-seed0-lr1",
        "h-transcoder-mp-k4-x64-seed0-lr1-detach-input-loss0.5",
        "h-transcoder-topk-k4-x64-seed0-lr1",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": ("topk",), "detach": True}, "detach has no effect .* train an mp coder too"),
        ({"input_loss": 0.1}, "input_loss has no effect on kind sae .* an mp transcoder too"),
        ({"shortlist_size": 8}, "shortlist_size is for backend shortlist, got backend auto"),
        ({"codes": "omp", "backend": "gram"}, "codes omp needs backend direct, got gram"),
        ({"codes": "gp", "arch": ("batch-mp",)}, "codes has no effect on .* arch batch-mp"),
        ({"codes": "gp", "detach": True}, "detach is for codes mp, got codes gp"),
        ({"codes": "gp", "per_step_loss": True}, "per_step_loss is for codes mp"),
        ({"nested": True, "per_step_loss": True}, "each replace the loss; use one"),
        ({"input_loss": -1.0, "kind": ("transcoder",)}, "input_loss must not be negative"),
    ],
)
def test_refuses_what_would_have_no_effect(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_name_is_every_field_that_is_not_default():
    coder = CoderConfig(hookpoint="h", kind="sae", arch="mp", k=2, expansion=3, tolerance=0.25)
    assert coder.name == "h-sae-mp-k2-x3-seed0-tolerance0.25"
