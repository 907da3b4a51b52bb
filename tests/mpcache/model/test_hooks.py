"""Captured values are the model's own, and no layer runs without need."""

import pytest
import torch
from torch import nn

from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hooks import Capture, widths
from tests.helpers.models import captured, tiny_model

TOKENS = torch.randint(0, 250, (3, 7), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "llama": "layers",
    "gpt2": "h",
    "neox": "layers",
    "bert": "encoder.layer",
    "modernbert": "layers",
}


def capture(model: nn.Module, *patterns: str) -> dict[str, torch.Tensor]:
    with Capture(model, resolve_sides(patterns, model)) as hooks:
        return {str(side): value for side, value in captured(hooks, {"input_ids": TOKENS}).items()}


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_hidden_states(name):
    model, layers = tiny_model(name), LAYERS[name]
    states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    got = capture(model, f"{layers}.*:input", f"{layers}.0")
    for i in range(3):
        assert torch.equal(got[f"{layers}.{i}:input"], states[i])
    assert torch.equal(got[f"{layers}.0:output"], states[1])


@pytest.mark.parametrize(
    ("name", "mlp"), [("llama", "layers.1.mlp"), ("gpt2", "h.1.mlp"), ("neox", "layers.1.mlp")]
)
def test_an_mlp_gives_both_sides_that_belong_together(name, mlp):
    model = tiny_model(name)
    got = capture(model, mlp)
    assert list(got) == [f"{mlp}:input", f"{mlp}:output"]
    assert torch.equal(model.get_submodule(mlp)(got[f"{mlp}:input"]), got[f"{mlp}:output"])


def test_tuples_and_keywords():
    model = tiny_model()
    seen = []
    model.layers[1].self_attn.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs["hidden_states"].clone(), output[0])),
        with_kwargs=True,
    )
    got = capture(model, "layers.1.self_attn:input", "layers.1.self_attn")
    assert torch.equal(got["layers.1.self_attn:input"], seen[-1][0])
    assert torch.equal(got["layers.1.self_attn:output"], seen[-1][1])


def test_stops_when_all_is_seen():
    model, passes = tiny_model(), []
    model.layers[2].register_forward_pre_hook(lambda *_: passes.append(2))
    model.layers[1].register_forward_pre_hook(lambda *_: passes.append(1))
    with Capture(model, resolve_sides(["layers.0", "layers.1.mlp:input"], model)) as hooks:
        assert passes == [
            1,
            2,
        ]  # the first tiny pass runs completely, to detect modules that run twice
        captured(hooks, {"input_ids": TOKENS})
        assert passes == [1, 2, 1]


def test_leaves_the_model_as_it_was():
    model = tiny_model()
    before = model(input_ids=TOKENS).last_hidden_state
    capture(model, "layers.*", "layers.*.mlp")
    assert torch.equal(before, model(input_ids=TOKENS).last_hidden_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.layers)


class InPlace(nn.Module):
    """A model that changes values in place, runs one module twice and one module never."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(250, 4), nn.Linear(4, 4)
        self.twice, self.never = nn.Identity(), nn.Identity()
        self.last = nn.Flatten(0, 1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        y = self.mlp(x)
        y += self.twice(self.twice(x))
        return self.last(y)


def test_copies_before_the_model_changes_values_in_place():
    model = InPlace().requires_grad_(False)
    got = capture(model, "mlp")
    assert torch.equal(got["mlp:output"], model.mlp(got["mlp:input"]))


@pytest.mark.parametrize(
    ("hookpoint", "message"),
    [
        ("twice", "twice:output cannot be collected: it must run once .* but it runs 2 times"),
        ("never", "never:output .*but it does not run; `mpcache hookpoints MODEL` lists all"),
        (
            "last",
            r"last:output .*: its value must be floats \[B, L, width\].*got torch.float32 \[6, 4\]",
        ),
        ("embed:input", r"embed:input .*: its value must be floats.*got torch.int64 \[2, 3\]"),
    ],
)
def test_refuses_what_is_not_one_row_per_token(hookpoint, message):
    model = InPlace().requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        widths(model, resolve_sides([hookpoint], model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.children())


def test_widths():
    model = tiny_model("llama", mlp=48)
    sides = resolve_sides(["layers.0", "layers.0.mlp.down_proj:input"], model)
    assert list(widths(model, sides).values()) == [16, 48]


def test_resolve_keeps_the_order_of_the_model_and_each_side_once():
    model = tiny_model(layers=11)
    got = [str(s) for s in resolve_sides(["layers.10.mlp", "layers.2", "layers.*:output"], model)]
    assert len(got) == 13
    assert got[:3] == ["layers.0:output", "layers.1:output", "layers.2:output"]
    assert got[-3:] == ["layers.10:output", "layers.10.mlp:input", "layers.10.mlp:output"]
    assert resolve_sides(["layers.1.mlp:output"], model) == (Side("layers.1.mlp", "output"),)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "layer.1.mlp",
            "must be a module of LlamaModel, got layer.1.mlp; similar names: .*layers.*.mlp",
        ),
        (
            "layers.30.mlp",
            r"similar names: layers\.\*\.mlp.*; `mpcache hookpoints MODEL` lists all",
        ),
        ("model.layers.1", "must be a module of LlamaModel"),
        ("layers.1:residual", "write input or output, got 'residual'"),
        ("layers.1*", "must stand alone between dots"),
        ("layers..1", "joined by dots"),
        ("../layers", "joined by dots"),
        ("/layers", "joined by dots"),
        ("layers.1\n", "joined by dots"),
        ("", "joined by dots"),
    ],
)
def test_resolve_refuses(pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve_sides([pattern], tiny_model())
    assert "\n" not in str(error.value)
