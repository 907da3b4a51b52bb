"""The peak learning rate of a coder: as given, or by a rule that was fitted to searches.

docs/learning-rates.md has the searches, the fit and what the rule costs on other settings.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mptrain.config.architectures import ARCHITECTURES, Arch
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Optimizer
from mptrain.config.sides import Kind

REFERENCE = {"width": 256, "latents": 1024, "k": 16, "batch_rows": 256, "steps": 500}
"the setting at which a rule has its constants"
SEARCHED = {
    "width": (256, 640),
    "latents": (512, 8192),
    "k": (4, 64),
    "batch_rows": (64, 1024),
    "steps": (125, 2000),
}
"least and largest sizes of the searches, by which the rules were fitted or checked"
_SIZE_NAMES = {"width": "width", "latents": "latents", "k": "K", "batch_rows": "rows a step"}
GIVEN = "given"
"reason of a rate that the config has"

Family = Literal["sae", "transcoder"]
"the kinds of coders that share a rule; skip transcoders are transcoders"
EncoderClass = Literal["pursuit", "linear"]
"the architectures that share a rule"
RuleKey = tuple[Optimizer, Family, EncoderClass]


@dataclass(frozen=True)
class RateRule:
    """`lr = constant * sqrt(256 / width) * product of (x / reference) ** exponent`.

    For transcoders without a skip, it is also times `exp(without_skip)`. For linear encoders, a K
    below 16 counts as 16.
    """

    constants: Mapping[Arch, float]
    latents: float
    "exponent; the others too"
    k: float
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
    return RULES[config.resolved_optimizer, family_of(config.kind), encoder_class(config.arch)]


def family_of(kind: Kind) -> Family:
    """Return which coders share the rule of this kind."""
    return "sae" if kind == "sae" else "transcoder"


def encoder_class(arch: Arch) -> EncoderClass:
    """Return which architectures share the rule of this one."""
    return "pursuit" if ARCHITECTURES[arch].is_pursuit else "linear"


def counted_k(k: int, encoder: EncoderClass) -> int:
    """Return the K that a rule takes a power of."""
    return k if encoder == "pursuit" else max(k, REFERENCE["k"])


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
    sizes = {"width": input_width, "latents": latents, "batch_rows": batch_rows, "steps": steps}
    value = rule.constants[config.arch] * math.sqrt(REFERENCE["width"] / input_width)
    for name in ("latents", "batch_rows", "steps"):
        value *= (sizes[name] / REFERENCE[name]) ** getattr(rule, name)
    if config.k is not None:
        sizes["k"] = config.k
        value *= (counted_k(config.k, encoder_class(config.arch)) / REFERENCE["k"]) ** rule.k
    if config.kind == "transcoder":
        value *= math.exp(rule.without_skip)
    label = ARCHITECTURES[config.arch].label
    k = "" if config.k is None else f"K {config.k}, "
    reason = (
        f"rule for {label}, {config.kind}, {config.resolved_optimizer}, {latents:,} latents, {k}"
        f"{batch_rows:,} rows a step, {steps:,} steps{_extrapolation(sizes)}"
    )
    return LearningRate(float(f"{value:.2g}"), reason)


def _extrapolation(sizes: Mapping[str, int]) -> str:
    """Which sizes no search had, as the end of a reason."""
    beyond = [
        _SIZE_NAMES.get(name, name)
        for name, (least, most) in SEARCHED.items()
        if name in sizes and not least <= sizes[name] <= most
    ]
    return f"; extrapolated in {', '.join(beyond)}" if beyond else ""


def _constants(constant: float, others: Mapping[Arch, float] | None = None) -> dict[Arch, float]:
    """The constant of each architecture; those of `others` have their own."""
    return {**dict.fromkeys(ARCHITECTURES, constant), **(others or {})}


# fitted to searches of every factor; jumprelu, whose thresholds have a long way from their start,
# has the constant of a search (docs/data/trainers.csv)
_ADAM_SAE_PURSUIT = RateRule(
    _constants(0.01741, {"batch-mp": 0.01751}),
    latents=-0.219,
    k=-0.025,
    batch_rows=0.276,
    steps=-0.4,
)
_ADAM_SAE_LINEAR = RateRule(
    _constants(0.00852, {"batch-topk": 0.00922, "jumprelu": 0.035}),
    latents=-0.195,
    k=0.459,
    batch_rows=0.152,
    steps=-0.302,
)
# the same, without an auxiliary loss
_MUON_SAE_PURSUIT = RateRule(
    _constants(0.0193), latents=-0.332, k=-0.173, batch_rows=0.308, steps=-0.468
)
_MUON_SAE_LINEAR = RateRule(
    _constants(0.009625), latents=-0.331, k=0.171, batch_rows=0.208, steps=-0.454
)
_MUON_TRANSCODER_PURSUIT = RateRule(
    _constants(0.01569),
    latents=-0.225,
    k=0.037,
    batch_rows=0.393,
    steps=-0.353,
    without_skip=0.154,
)
_MUON_TRANSCODER_LINEAR = RateRule(
    _constants(0.01185),
    latents=-0.205,
    k=-0.072,
    batch_rows=0.339,
    steps=-0.296,
    without_skip=0.207,
)
# constants of three rates each; exponents of SAEs
_ADAM_TRANSCODER_PURSUIT = replace(_ADAM_SAE_PURSUIT, constants=_constants(0.0102))
_ADAM_TRANSCODER_LINEAR = replace(_ADAM_SAE_LINEAR, constants=_constants(0.0082))
# constants of a search each; exponents of sparsify
_SIGNSGD_PURSUIT = RateRule(_constants(0.0179), latents=-0.5, k=0.0, batch_rows=0.0, steps=0.0)
_SIGNSGD_LINEAR = replace(_SIGNSGD_PURSUIT, constants=_constants(0.0103))
RULES: dict[RuleKey, RateRule] = {
    ("adam", "sae", "pursuit"): _ADAM_SAE_PURSUIT,
    ("adam", "sae", "linear"): _ADAM_SAE_LINEAR,
    ("adam", "transcoder", "pursuit"): _ADAM_TRANSCODER_PURSUIT,
    ("adam", "transcoder", "linear"): _ADAM_TRANSCODER_LINEAR,
    ("muon", "sae", "pursuit"): _MUON_SAE_PURSUIT,
    ("muon", "sae", "linear"): _MUON_SAE_LINEAR,
    ("muon", "transcoder", "pursuit"): _MUON_TRANSCODER_PURSUIT,
    ("muon", "transcoder", "linear"): _MUON_TRANSCODER_LINEAR,
    ("signsgd", "sae", "pursuit"): _SIGNSGD_PURSUIT,
    ("signsgd", "sae", "linear"): _SIGNSGD_LINEAR,
    ("signsgd", "transcoder", "pursuit"): _SIGNSGD_PURSUIT,
    ("signsgd", "transcoder", "linear"): _SIGNSGD_LINEAR,
}
