"""Sides of hookpoints: what coders read and predict."""

from typing import Literal, TypedDict

from mpcache.errors import UsageError

Kind = Literal["sae", "transcoder", "skip-transcoder"]
Side = tuple[str, str]
"""(hookpoint, "input" or "output")"""
Sides = tuple[Side, Side]
"what a coder reads, and what it predicts"


class CoderSides(TypedDict):
    """The fields of a coder's config that name sides, as `hookpoint:side`."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]


def parse_side(text: str) -> Side:
    """`layers.10:output` as a pair. Raises UsageError for other texts."""
    hookpoint, _, side = text.rpartition(":")
    if not hookpoint or side not in ("input", "output"):
        raise UsageError(
            f"a side must be HOOKPOINT:input or HOOKPOINT:output, got {text!r}; "
            "write it as in layers.10:output"
        )
    return hookpoint, side


def hookpoint_sides(hookpoint: str, kind: Kind) -> CoderSides:
    """The sides of a coder at one hookpoint: an SAE reconstructs the output, a transcoder predicts
    the output from the input.
    """
    output = f"{hookpoint}:output"
    return {"inputs": (output if kind == "sae" else f"{hookpoint}:input",), "targets": (output,)}


def sides_name(inputs: tuple[str, ...], targets: tuple[str, ...], kind: Kind) -> str:
    """The sides in a coder's name: the hookpoint alone where `hookpoint_sides` implies them."""
    hookpoint, _ = parse_side(targets[0])
    if hookpoint_sides(hookpoint, kind) == {"inputs": inputs, "targets": targets}:
        return hookpoint
    sides = inputs if inputs == targets else (*inputs, "to", *targets)
    return "-".join(side.replace(":", "-") for side in sides)
