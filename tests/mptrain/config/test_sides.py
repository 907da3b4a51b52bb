"""The sides that a coder reads and predicts, and its name."""

from typing import Any

import pytest

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_grid import FitConfig
from mptrain.config.sides import Kind, hookpoint_sides, parse_side

MLP_IN, NORM_OUT = "layers.1.mlp:input", "layers.1.post_feedforward_layernorm:output"


def fitted(**changes: Any) -> tuple[CoderConfig, ...]:
    return FitConfig(store="s", run="r", arch=("mp",), k=(4,), **changes).coders()


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip-transcoder"])
def test_the_short_form_gives_the_same_coder(kind: Kind) -> None:
    (short,) = fitted(hookpoints=("layers.1.mlp",), kind=(kind,))
    sides = hookpoint_sides("layers.1.mlp", kind)
    (long,) = fitted(input=sides["inputs"], target=sides["targets"], kind=(kind,))
    assert short == long
    assert short.name == f"layers.1.mlp-{kind}-mp-k4-x64-seed0"


def test_a_transcoder_between_two_hookpoints_is_named_after_both() -> None:
    (coder,) = fitted(input=(MLP_IN,), target=(NORM_OUT,), kind=("transcoder",))
    assert coder.sides == (parse_side(MLP_IN), parse_side(NORM_OUT))
    assert coder.name.startswith(
        "layers.1.mlp-input-to-layers.1.post_feedforward_layernorm-output-transcoder-mp-k4"
    )
    (sae,) = fitted(input=(MLP_IN,))
    assert sae.sides == (("layers.1.mlp", "input"),) * 2
    assert sae.name.startswith("layers.1.mlp-input-sae-mp-k4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "hookpoints is empty"),
        ({"hookpoints": ("a",), "input": ("a:input",)}, "give only one of them"),
        ({"hookpoints": ("a",), "target": ("a:input",)}, "target=a:input needs an input"),
        ({"input": ("a",)}, "a side must be HOOKPOINT:input or HOOKPOINT:output, got 'a'"),
        ({"input": (MLP_IN,), "target": (NORM_OUT,)}, "kind=sae predicts what it reads"),
        (
            {"input": (MLP_IN,), "kind": ("transcoder",)},
            "a side other than .* name that other side with --target",
        ),
        (
            {"input": (MLP_IN,), "target": (MLP_IN,), "kind": ("sae", "skip-transcoder")},
            f"kind=skip-transcoder predicts a side other than {MLP_IN}",
        ),
        (
            {"input": (MLP_IN, "b:input"), "target": (NORM_OUT,), "kind": ("transcoder",)},
            "inputs must have exactly one HOOKPOINT:input or HOOKPOINT:output, got "
            "layers.1.mlp:input,b:input; coders of several sides",
        ),
        (
            {"input": (MLP_IN,), "target": (NORM_OUT, "b:output"), "kind": ("transcoder",)},
            "targets must have exactly one",
        ),
    ],
    ids=str,
)
def test_refuses_other_sides(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fitted(**changes)
