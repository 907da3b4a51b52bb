"""Hookpoint patterns, such as layers.*.mlp:input -> the sides of a model that they name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torch import nn

from mpcache.errors import UsageError
from mpcache.validation import is_hookpoint

SideName = Literal["input", "output"]


# the last segment of a hookpoint that is an MLP, of which a transcoder needs both sides
MLP_NAMES = {"mlp", "ffn", "ff", "feed_forward", "feedforward", "block_sparse_moe"}


LIST_THEM = "`mpcache hookpoints MODEL` lists all that can be collected"


@dataclass(frozen=True, order=True)
class Side:
    """One side of a hookpoint."""

    hookpoint: str
    side: SideName

    def __str__(self) -> str:
        return f"{self.hookpoint}:{self.side}"


def resolve_sides(patterns: Iterable[str], model: nn.Module) -> tuple[Side, ...]:
    """The sides that patterns name, in the model's order, each once.

    Raises UsageError for a pattern that is malformed or matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    wanted = {side for pattern in patterns for side in match(pattern, names, model)}
    rank = {name: place for place, name in enumerate(names)}
    return tuple(sorted(wanted, key=lambda side: (rank[side.hookpoint], side.side)))


def match(pattern: str, names: list[str], model: nn.Module) -> list[Side]:
    """The sides that one pattern names; input sorts before output."""
    hookpoint, colon, side = pattern.partition(":")
    segments = check_segments(hookpoint)
    if colon and side not in ("input", "output"):
        raise UsageError(f"a side must be input or output, got {side!r} in {pattern!r}")
    found = [name for name in names if is_match(segments, name.split("."))]
    if not found:
        raise UsageError(
            f"a hookpoint must be a module of {type(model).__name__}, got {hookpoint}; "
            f"near: {', '.join(near_names(hookpoint, names))}; {LIST_THEM}"
        )
    if strange := [name for name in found if not is_hookpoint(name)]:
        raise UsageError(
            f"{pattern} matches the module {strange[0]!r}, whose name cannot be a folder's; "
            "name the others one by one"
        )
    return [side_ for name in found for side_ in sides_of(name, side)]


def check_segments(hookpoint: str) -> list[str]:
    """The segments of a hookpoint; it becomes a path in the store, so nothing may lead astray."""
    segments = hookpoint.split(".")
    if not hookpoint.isprintable() or re.search(r"[\s/\\]", hookpoint) or "" in segments:
        raise UsageError(
            f"a hookpoint must be names joined by dots, got {hookpoint!r}; write layers.10.mlp"
        )
    if any("*" in segment and segment != "*" for segment in segments):
        raise UsageError(f"* must be a whole segment, got {hookpoint!r}; write layers.*.mlp")
    return segments


def is_match(pattern: list[str], segments: list[str]) -> bool:
    return len(pattern) == len(segments) and all(
        wanted in ("*", got) for wanted, got in zip(pattern, segments, strict=True)
    )


def sides_of(hookpoint: str, side: str) -> list[Side]:
    """The side asked for; without one, the output, and for an MLP both."""
    if side == "input":
        return [Side(hookpoint, "input")]
    is_both = not side and hookpoint.rpartition(".")[2].lower() in MLP_NAMES
    return [Side(hookpoint, "input")] * is_both + [Side(hookpoint, "output")]


def near_names(hookpoint: str, names: list[str]) -> list[str]:
    """The model's names most like a wrong one, first as patterns."""
    patterns = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    starred = re.sub(r"\b\d+\b", "*", hookpoint)
    near = [
        *get_close_matches(starred, patterns, n=3, cutoff=0.5),
        *get_close_matches(hookpoint, names, n=3, cutoff=0.6),
    ]
    return list(dict.fromkeys(near)) or patterns[:5]
