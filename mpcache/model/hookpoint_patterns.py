"""Hookpoint patterns, such as layers.*.mlp:input -> the sides of a model that they name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torch import nn

from mpcache.errors import UsageError
from mpcache.untrusted_names import is_hookpoint

SideName = Literal["input", "output"]

# last segments that name an MLP; a transcoder needs both sides of an MLP
MLP_NAMES = {"mlp", "ffn", "ff", "feed_forward", "feedforward", "block_sparse_moe"}
LIST_THEM = "`mpcache hookpoints MODEL` lists all that can be collected"


@dataclass(frozen=True, order=True)
class Side:
    """One side of a hookpoint."""

    hookpoint: str
    side: SideName

    def __str__(self) -> str:
        return f"{self.hookpoint}:{self.side}"

    @classmethod
    def parse(cls, text: str) -> "Side":
        """The side with this text form, the inverse of `str`."""
        hookpoint, _, side = text.rpartition(":")
        return cls(hookpoint, "input" if side == "input" else "output")


def resolve_sides(patterns: Iterable[str], model: nn.Module) -> tuple[Side, ...]:
    """The sides that the patterns name, in the model's order, each once.

    Raises UsageError for a malformed pattern and for a pattern that matches no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    sides = {side for pattern in patterns for side in _matching_sides(pattern, names, model)}
    rank = {name: number for number, name in enumerate(names)}
    return tuple(sorted(sides, key=lambda side: (rank[side.hookpoint], side.side)))


def _matching_sides(pattern: str, names: list[str], model: nn.Module) -> list[Side]:
    """The sides that one pattern names; the input comes before the output."""
    hookpoint, colon, side = pattern.partition(":")
    segments = pattern_segments(hookpoint)
    if colon and side not in ("input", "output"):
        raise UsageError(
            f"after the colon of a hookpoint, write input or output, got {side!r} in {pattern!r}"
        )
    matches = [name for name in names if matches_pattern(segments, name.split("."))]
    if not matches:
        raise UsageError(
            f"a hookpoint must be a module of {type(model).__name__}, got {hookpoint}; similar "
            f"names: {', '.join(_similar_names(hookpoint, names))}; {LIST_THEM}"
        )
    if invalid := [name for name in matches if not is_hookpoint(name)]:
        raise UsageError(
            f"{pattern} matches the module {invalid[0]!r}, whose name cannot be the name of a "
            "folder; give the other modules one by one"
        )
    return [matched for name in matches for matched in named_sides(name, side)]


def pattern_segments(hookpoint: str) -> list[str]:
    """The segments of a hookpoint, safe as a path, because the store has a folder of that name."""
    segments = hookpoint.split(".")
    if not hookpoint.isprintable() or re.search(r"[\s/\\]", hookpoint) or "" in segments:
        raise UsageError(
            "a hookpoint must be names joined by dots, such as layers.10.mlp, got "
            f"{hookpoint!r}; correct --hookpoints"
        )
    if any("*" in segment and segment != "*" for segment in segments):
        raise UsageError(
            f"* must stand alone between dots, such as layers.*.mlp, got {hookpoint!r}; correct "
            "--hookpoints"
        )
    return segments


def matches_pattern(pattern: list[str], segments: list[str]) -> bool:
    return len(pattern) == len(segments) and all(
        wanted in ("*", segment) for wanted, segment in zip(pattern, segments, strict=True)
    )


def named_sides(hookpoint: str, side: str) -> list[Side]:
    """The named side. Without a name: the output, and for an MLP both sides."""
    if side == "input":
        return [Side(hookpoint, "input")]
    is_both = not side and hookpoint.rpartition(".")[2].lower() in MLP_NAMES
    return [Side(hookpoint, "input")] * is_both + [Side(hookpoint, "output")]


def _similar_names(hookpoint: str, names: list[str]) -> list[str]:
    """The model's names most similar to a wrong name; patterns come first."""
    patterns = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    starred = re.sub(r"\b\d+\b", "*", hookpoint)
    similar = [
        *get_close_matches(starred, patterns, n=3, cutoff=0.5),
        *get_close_matches(hookpoint, names, n=3, cutoff=0.6),
    ]
    return list(dict.fromkeys(similar)) or patterns[:5]
