"""What can be collected from a model, known from its config alone."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from mpcache.config import CollectConfig, HookpointsConfig
from mpcache.errors import UsageError, first_line
from mpcache.model.hookpoint_roles import HookpointRole, roles
from mpcache.model.hookpoint_survey import HookpointSurvey, Verdict, starred
from mpcache.model.meta_forward import MetaForward, materialize_small_tensors_
from mpcache.model.skeleton import skeleton

BYTES = 2  # of a value in bfloat16, the storage dtype that is the default


@dataclass(frozen=True, kw_only=True)
class Hookpoint:
    """Modules that are alike, under one pattern."""

    hookpoint: str
    "the path, with * for a number"
    numbers: str
    "the numbers that * stands for; empty without one"
    module: str
    "class of the modules, and the type of a layer where the config says one"
    input: int | None
    "width of the input; None where it cannot be collected"
    output: int | None
    input_bytes: int | None
    "bytes a row in bfloat16"
    output_bytes: int | None
    input_reason: str | None
    "why the input cannot be collected"
    output_reason: str | None
    is_idle: bool
    "neither the modules nor what is inside them run on text"
    modules: tuple[str, ...]
    "the full path of each module"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The hookpoints of a model."""

    model: str
    model_class: str
    attention: str
    "attention implementation of the model"
    has_no_sdpa: bool
    "the model has no sdpa attention, which collect takes by default"
    hookpoints: tuple[Hookpoint, ...]
    roles: tuple[HookpointRole, ...]
    "where to find what users of transcoders ask for"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_hookpoints(config: HookpointsConfig) -> Report:
    """Raises UsageError where there is no such model, or one that does not run on text."""
    model, attention = weightless_model(config)
    survey = survey_model(model)
    return Report(
        model=config.model,
        model_class=type(model).__name__,
        attention=attention,
        has_no_sdpa=config.attention is None and attention != "sdpa",
        hookpoints=fold(model, survey),
        roles=roles(survey),
    )


def weightless_model(config: HookpointsConfig) -> tuple[PreTrainedModel, str]:
    """The model without weights, ready to run inside `MetaForward`, and its attention."""
    asked = CollectConfig(
        model=config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attention=config.attention or "sdpa",
        dataset="",
        hookpoints=("*",),
        ctx_len=1,
    )
    try:
        model = skeleton(asked)
    except UsageError:
        if config.attention is not None:
            raise
        other = replace(asked, attention="eager")
        try:
            model, asked = skeleton(other), other
        except UsageError:
            skeleton(asked)  # the first error is the one that helps
            raise
    except ImportError as error:
        raise UsageError(f"{config.model} needs another library: {first_line(error)}") from error
    materialize_small_tensors_(model)
    model.train(False).requires_grad_(False)
    return model, asked.attention


def survey_model(model: PreTrainedModel) -> HookpointSurvey:
    """Raises UsageError for a model that does not run on tokens alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny
    try:
        with MetaForward() as weights:
            try:
                return HookpointSurvey(model.to(torch.bfloat16), weights.added)  # type: ignore[arg-type]  # hidden by a decorator
            except (RuntimeError, TypeError):  # few models compute in float32 alone
                return HookpointSurvey(model.to(torch.float32), weights.added)  # type: ignore[arg-type]
    except Exception as error:  # what a model raises that lacks an input has no common base
        raise UsageError(
            f"{type(model).__name__} must run on tokens alone, but it raises "
            f"{type(error).__name__}: {first_line(error)}; use a language model"
        ) from error
    finally:
        torch.set_num_threads(threads)


# --- folding ---


def fold(model: PreTrainedModel, survey: HookpointSurvey) -> tuple[Hookpoint, ...]:
    """Modules under the same pattern, of the same class and with the same verdicts, as one."""
    types = layer_types(model)
    groups: dict[tuple[str, str, bool, Verdict, Verdict], list[str]] = {}
    modules = dict(model.named_modules())
    for name in survey.names:
        label = type(modules[name]).__name__ + types.get(name, "")
        verdicts = survey.verdict(name, "input"), survey.verdict(name, "output")
        groups.setdefault((starred(name), label, name in survey.idle, *verdicts), []).append(name)
    rank = {pattern: place for place, pattern in enumerate(dict.fromkeys(k[0] for k in groups))}
    keys = sorted(groups, key=lambda key: rank[key[0]])  # groups of a pattern side by side
    return tuple(_hookpoint(*key, groups[key]) for key in keys)


def _hookpoint(
    pattern: str,
    module: str,
    is_idle: bool,
    input: Verdict,
    output: Verdict,
    names: Sequence[str],
) -> Hookpoint:
    return Hookpoint(
        hookpoint=pattern,
        numbers=numbers_of(names),
        module=module,
        input=input.width,
        output=output.width,
        input_bytes=None if input.width is None else BYTES * input.width,
        output_bytes=None if output.width is None else BYTES * output.width,
        input_reason=input.reason,
        output_reason=output.reason,
        is_idle=is_idle,
        modules=tuple(names),
    )


def layer_types(model: PreTrainedModel) -> dict[str, str]:
    """What the config says of each layer, such as its kind of attention, by the layer's name."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    names = [name for name, _ in model.named_modules() if re.fullmatch(r"\D*\.\d+", name)]
    lists: dict[str, list[str]] = {}
    for name in names:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: f" ({kind})"
        for layers in lists.values()
        if len(layers) == len(types) and len(set(types)) > 1
        for name, kind in zip(layers, types, strict=True)
    }


def numbers_of(names: Sequence[str]) -> str:
    """The numbers in names of one pattern: 0-2,5, and 0-2 x 0-7 where there are two in each."""
    numbers = [[int(s) for s in name.split(".") if s.isdigit()] for name in names]
    places = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    return " x ".join(map(ranges, places))


def ranges(numbers: Iterable[int]) -> str:
    """0,1,2,5 -> 0-2,5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)
