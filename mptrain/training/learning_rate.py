"""The peak learning rate of a coder: as given, or by a rule that was fitted to searches.

docs/learning-rates.md has the searches, the fit and what the rule costs on other settings.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from mptrain.config.architectures import ARCHITECTURES, Arch
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Optimizer
from mptrain.config.sides import Kind

REFERENCE = {"width": 256, "latents": 1024, "k": 16, "batch_rows": 256, "steps": 500}
"the setting at which a rule has its constants"
GIVEN = "given"
"reason of a rate that the config has"


Family = Literal["sae", "transcoder"]
"the kinds of coders that share a rule; skip transcoders are transcoders"


@dataclass(frozen=True)
class RateRule:
    """`lr = constant * sqrt(256 / width) * product of (x / reference) ** exponent`.

    For transcoders without a skip, it is also times `exp(without_skip)`.
    """

    constants: Mapping[Arch, float]
    latents: float
    "exponent; the others too"
    k_pursuit: float
    k_linear: float
    "of K where it is above 16, for encoders that are no pursuit"
    batch_rows: float
    steps: float
    without_skip: float = 0.0
    "logarithm of a factor for transcoders without a skip"


@dataclass(frozen=True)
class LearningRate:
    """A peak learning rate, and where it comes from."""

    value: float
    reason: str


def rule_of(config: CoderConfig) -> RateRule:
    """Return the rule of the rate of such coders."""
    return RULES[config.resolved_optimizer, family_of(config.kind)]


def family_of(kind: Kind) -> Family:
    """Return which coders share the rule of this kind."""
    return "sae" if kind == "sae" else "transcoder"


def learning_rate(
    config: CoderConfig, input_width: int, batch_rows: int, steps: int
) -> LearningRate:
    """Return the config's own rate, or the rate of the rule.

    The rows of a dictionary have unit norm, and an optimizer moves each of their elements by about
    the rate: for the same angle, a rate must be smaller in proportion to `1 / sqrt(width)`.

    Args:
        config: the coder.
        input_width: dimensions of its input.
        batch_rows: rows in a train step.
        steps: train steps of the run.
    """
    if config.lr is not None:
        return LearningRate(config.lr, GIVEN)
    rule = rule_of(config)
    latents = config.latents_of(input_width)
    sizes = {"latents": latents, "batch_rows": batch_rows, "steps": steps}
    value = rule.constants[config.arch] * math.sqrt(REFERENCE["width"] / input_width)
    for name, size in sizes.items():
        value *= (size / REFERENCE[name]) ** getattr(rule, name)
    if config.k is not None:
        ratio = config.k / REFERENCE["k"]
        is_pursuit = config.architecture.is_pursuit
        value *= ratio**rule.k_pursuit if is_pursuit else max(ratio, 1.0) ** rule.k_linear
    if config.kind == "transcoder":
        value *= math.exp(rule.without_skip)
    label = ARCHITECTURES[config.arch].label
    k = "" if config.k is None else f"K {config.k}, "
    reason = (
        f"rule for {label}, {config.kind}, {config.resolved_optimizer}, {latents:,} latents, {k}"
        f"{batch_rows:,} rows a step, {steps:,} steps"
    )
    return LearningRate(float(f"{value:.2g}"), reason)


def _constants(
    mp: float, topk: float, others: Mapping[Arch, float] = MappingProxyType({})
) -> dict[Arch, float]:
    """The constant of each architecture; those without their own take that of mp or of topk."""
    constants = {
        name: mp if architecture.is_pursuit else topk
        for name, architecture in ARCHITECTURES.items()
    }
    return {**constants, **others}


# fitted to searches of every factor
_ADAM_SAE = RateRule(
    _constants(0.01718, 0.00921, {"batch-mp": 0.01751, "batch-topk": 0.01073}),
    latents=-0.155,
    k_pursuit=-0.021,
    k_linear=0.449,
    batch_rows=0.255,
    steps=-0.349,
)
# the same, without an auxiliary loss
_MUON_SAE = RateRule(
    _constants(0.01912, 0.009638),
    latents=-0.33,
    k_pursuit=-0.173,
    k_linear=0.17,
    batch_rows=0.235,
    steps=-0.458,
)
_MUON_TRANSCODER = RateRule(
    _constants(0.01544, 0.01198),
    latents=-0.217,
    k_pursuit=0.04,
    k_linear=-0.08,
    batch_rows=0.352,
    steps=-0.313,
    without_skip=0.191,
)
# constants of three rates each; exponents of SAEs
_ADAM_TRANSCODER = replace(_ADAM_SAE, constants=_constants(0.0102, 0.0082))
# constants of a search each; exponents of sparsify
_SIGNSGD = RateRule(
    _constants(0.0179, 0.0103),
    latents=-0.5,
    k_pursuit=0.0,
    k_linear=0.0,
    batch_rows=0.0,
    steps=0.0,
)
RULES: dict[tuple[Optimizer, Family], RateRule] = {
    ("adam", "sae"): _ADAM_SAE,
    ("adam", "transcoder"): _ADAM_TRANSCODER,
    ("muon", "sae"): _MUON_SAE,
    ("muon", "transcoder"): _MUON_TRANSCODER,
    ("signsgd", "sae"): _SIGNSGD,
    ("signsgd", "transcoder"): _SIGNSGD,
}
