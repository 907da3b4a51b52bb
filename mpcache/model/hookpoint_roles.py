"""The sides with a meaning: the residual stream, and what attention and MLP read, write and add.

The pass of the survey shows which tensors a layer adds. So a norm after the MLP (Gemma 2 and 3,
OLMo 2 and 3) needs no list of models. Where a layer adds something that is not the output of a
module, such as a multiple of an output (Granite), there is no side to name.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mpcache.model.hookpoint_patterns import MLP_NAMES
from mpcache.model.hookpoint_survey import HookpointSurvey, ModuleCall, starred

_ATTENTION_NAMES = {"attn", "attention"}  # the last word of a module's name


@dataclass(frozen=True)
class HookpointRole:
    """A side with a meaning."""

    role: str
    "such as residual stream or MLP reads"
    side: str
    "pattern over layers, such as layers.*:output"


def roles(survey: HookpointSurvey) -> tuple[HookpointRole, ...]:
    """The roles in all layers, each pattern once, in the model's order."""
    numbered = [n for n in survey.calls if sum(s.isdigit() for s in n.split(".")) == 1]
    layers = [
        name for name in numbered if name in survey.layers
    ]  # the other numbered modules are containers
    all_roles = [role for layer in layers for role in _roles_of(survey, layer)]
    order = {name: i for i, name in enumerate(dict.fromkeys(role.role for role in all_roles))}
    return tuple(sorted(dict.fromkeys(all_roles), key=lambda role: order[role.role]))


def _roles_of(survey: HookpointSurvey, layer: str) -> Iterator[HookpointRole]:
    calls = survey.calls[layer]
    if survey.verdict(layer, "output").width is not None:
        yield _role("residual stream", layer, "output")
    elif survey.verdict(calls[0].name, "input").width is not None:
        yield _role("stream that a layer reads", calls[0].name, "input")
    for call in calls:
        last = call.name.rpartition(".")[2].lower()
        if last.split("_")[-1] in _ATTENTION_NAMES:
            yield from _written_by(survey, "attention", call, calls)
        elif last in MLP_NAMES:
            if survey.verdict(call.name, "input").width is not None:
                yield _role("MLP reads", call.name, "input")
            yield from _written_by(survey, "MLP", call, calls)


def _written_by(
    survey: HookpointSurvey, module: str, call: ModuleCall, calls: list[ModuleCall]
) -> Iterator[HookpointRole]:
    """The output of a module, and what the layer adds to the stream after further modules."""
    last = call
    for follower in calls[calls.index(call) + 1 :]:
        if follower.input is last.output:
            last = follower
    is_added = survey.adds(call.name.rpartition(".")[0], last.output)
    if not (last is call and is_added) and survey.verdict(call.name, "output").width is not None:
        yield _role(f"{module} writes", call.name, "output")
    if is_added and survey.verdict(last.name, "output").width is not None:
        yield _role(f"{module} adds to the stream", last.name, "output")


def _role(role: str, name: str, side: str) -> HookpointRole:
    return HookpointRole(role, f"{starred(name)}:{side}")
