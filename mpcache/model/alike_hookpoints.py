"""Modules of a model that are alike -> one line of the report on hookpoints."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from mpcache.model.hookpoint_survey import HookpointSurvey, SideVerdict, starred

_BYTES = 2  # of a value in bfloat16, the default storage dtype


@dataclass(frozen=True, kw_only=True)
class HookpointGroup:
    """Modules that are alike, under one pattern."""

    hookpoint: str
    "the path, with * for a number"
    numbers: str
    "the numbers that * stands for, such as 0-11; empty without *"
    module: str
    "class of the modules, and the type of a layer if the config names one"
    input: int | None
    "width of the input, in values per row; None: the input cannot be collected"
    output: int | None
    "width of the output, in values per row; None: the output cannot be collected"
    input_bytes: int | None
    "bytes per row of the input in bfloat16"
    output_bytes: int | None
    "bytes per row of the output in bfloat16"
    input_reason: str | None
    "why the input cannot be collected"
    output_reason: str | None
    "why the output cannot be collected"
    is_idle: bool
    "neither the modules nor the modules inside them run on text"
    modules: tuple[str, ...]
    "the full path of each module"


def group_modules(model: PreTrainedModel, survey: HookpointSurvey) -> tuple[HookpointGroup, ...]:
    """Groups of modules with the same pattern, class and verdicts, in the model's order."""
    types = _layer_types(model)
    groups: dict[tuple[str, str, bool, SideVerdict, SideVerdict], list[str]] = {}
    modules = dict(model.named_modules())
    for name in survey.names:
        label = type(modules[name]).__name__ + types.get(name, "")
        verdicts = survey.verdict(name, "input"), survey.verdict(name, "output")
        groups.setdefault((starred(name), label, name in survey.idle, *verdicts), []).append(name)
    rank = {pattern: i for i, pattern in enumerate(dict.fromkeys(key[0] for key in groups))}
    keys = sorted(groups, key=lambda key: rank[key[0]])  # groups of a pattern follow each other
    return tuple(_group(*key, groups[key]) for key in keys)


def _group(
    pattern: str,
    module: str,
    is_idle: bool,
    input: SideVerdict,
    output: SideVerdict,
    names: Sequence[str],
) -> HookpointGroup:
    return HookpointGroup(
        hookpoint=pattern,
        numbers=numbers_in_names(names),
        module=module,
        input=input.width,
        output=output.width,
        input_bytes=None if input.width is None else _BYTES * input.width,
        output_bytes=None if output.width is None else _BYTES * output.width,
        input_reason=input.reason,
        output_reason=output.reason,
        is_idle=is_idle,
        modules=tuple(names),
    )


def _layer_types(model: PreTrainedModel) -> dict[str, str]:
    """The type of each layer, such as its kind of attention, by the layer's name.

    Empty if the config names no types, or the same type for all layers.
    """
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


def numbers_in_names(names: Sequence[str]) -> str:
    """The numbers in names of one pattern: 0-2,5, or 0-2 x 0-7 for two numbers in each name."""
    numbers = [[int(s) for s in name.split(".") if s.isdigit()] for name in names]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    return " x ".join(map(_ranges, columns))


def _ranges(numbers: Iterable[int]) -> str:
    """0,1,2,5 -> 0-2,5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans)
