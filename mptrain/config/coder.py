"""The config of a coder, and which of its settings go together."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.architectures import ARCHITECTURES, Arch, Architecture, architectures_with
from mptrain.config.coder_settings import CoderSettings, Optimizer, Schedule
from mptrain.config.sides import Kind, Side, Sides, parse_side, sides_name

DEFAULT_SCHEDULES: Mapping[Optimizer, Schedule] = {
    "adam": "linear",
    "muon": "linear",
    "signsgd": "constant",
}
DEFAULT_WARMUP_SHARES: Mapping[Optimizer, float] = {"adam": 0.1, "muon": 0.02, "signsgd": 0.02}
DEFAULT_DEAD_SHARE = 1 / 64
"of the rows of a run"
LEAST_DEAD_BATCHES = 4
_SHORTLIST = ("shortlist_size", "shortlist_refresh")


@dataclass(frozen=True, kw_only=True)
class CoderConfig(CoderSettings):
    """One coder: what it reads and predicts, its mathematics and how it is trained.

    `name` holds every field that is not default, and is the name of the coder's folder in a run.
    Raises UsageError where a value is out of its range or two settings contradict each other.

    Example:
        >>> from mptrain import CoderConfig
        >>> side = ("layers.1.mlp:output",)
        >>> config = CoderConfig(
        ...     inputs=side, targets=side, kind="sae", arch="topk", k=32, expansion=16
        ... )
        >>> config.name
        'layers.1.mlp-sae-topk-k32-x16-seed0'
    """

    inputs: tuple[str, ...]
    "what the coder reads, as HOOKPOINT:input or HOOKPOINT:output"
    targets: tuple[str, ...]
    "what the coder predicts, as HOOKPOINT:input or HOOKPOINT:output; for an sae the same as inputs"
    kind: Kind
    (
        "sae: reconstructs its input; transcoder: predicts another activation; skip-transcoder: "
        "also has a linear path"
    )
    arch: Arch
    (
        "architecture; batch-mp, batch-topk: K latents per row on average; groupmax: the largest "
        "latent of each of K groups"
    )
    k: int | None = None
    "active latents per row (mp: pursuit steps); None for an architecture without K"
    expansion: int | None = None
    "number of latents as a multiple of the input's width"
    latents: int | None = None
    "number of latents; give it instead of expansion"
    seed: int = 0
    "random seed of the initial weights"
    lr: float | None = None
    "peak learning rate; None: by the rule of `mptrain.training.learning_rate`"

    def __post_init__(self) -> None:
        checks = (_side_errors, _range_errors, _inapplicable_settings, _combination_errors)
        for error in itertools.chain.from_iterable(check(self) for check in checks):
            raise UsageError(error)

    @property
    def input(self) -> Side:
        """The side that it reads."""
        return parse_side(self.inputs[0])

    @property
    def target(self) -> Side:
        """The side that it predicts."""
        return parse_side(self.targets[0])

    @property
    def sides(self) -> Sides:
        """Input and target."""
        return self.input, self.target

    @property
    def sides_name(self) -> str:
        """The first part of its name: the hookpoint, or both sides where they are of two."""
        return sides_name(self.inputs, self.targets, self.kind)

    @property
    def architecture(self) -> Architecture:
        """Its row of the table of architectures."""
        return ARCHITECTURES[self.arch]

    @property
    def resolved_optimizer(self) -> Optimizer:
        """The optimizer, or what None of it stands for."""
        return self.optimizer or ("adam" if self.kind == "sae" else "muon")

    @property
    def resolved_schedule(self) -> Schedule:
        """The schedule, or what None of it stands for."""
        return self.schedule or DEFAULT_SCHEDULES[self.resolved_optimizer]

    @property
    def resolved_warmup_share(self) -> float:
        """The share of the warm-up, or what None of it stands for."""
        share = self.warmup_share
        return DEFAULT_WARMUP_SHARES[self.resolved_optimizer] if share is None else share

    def resolved_dead_rows(self, run_rows: int, batch_rows: int) -> int:
        """The rows after which a latent counts as dead, in a run of `run_rows` rows."""
        default = max(round(DEFAULT_DEAD_SHARE * run_rows), LEAST_DEAD_BATCHES * batch_rows)
        return self.dead_rows or default

    def resolved_settings(self, run_rows: int, batch_rows: int) -> dict[str, Any]:
        """Settings that have a default of their own for each coder, as they are in a run."""
        return {
            "optimizer": self.resolved_optimizer,
            "schedule": self.resolved_schedule,
            "warmup_share": self.resolved_warmup_share,
            "dead_rows": self.resolved_dead_rows(run_rows, batch_rows),
        }

    @property
    def name(self) -> str:
        """Every field that is not default; the name of its folder in a run."""
        size = f"x{self.expansion}" if self.latents is None else f"latents{self.latents}"
        k = "" if self.k is None else f"-k{self.k}"
        head = f"{self.sides_name}-{self.kind}-{self.arch}{k}-{size}-seed{self.seed}"
        head += "" if self.lr is None else f"-lr{self.lr:g}"
        named = {"inputs", "targets", "kind", "arch", "k", "expansion", "latents", "seed", "lr"}
        rest = [
            _named(f.name, getattr(self, f.name))
            for f in fields(self)
            if f.name not in named
            and f.default is not MISSING
            and getattr(self, f.name) != f.default
        ]
        return "-".join([head, *rest])

    @property
    def required_k(self) -> int:
        """`k`, of a coder whose architecture needs it."""
        assert self.k is not None
        return self.k

    def latents_of(self, input_width: int) -> int:
        """How many latents it has on an input of that width."""
        if self.latents is not None:
            return self.latents
        assert self.expansion is not None
        return self.expansion * input_width


def all_sides(configs: Iterable[CoderConfig]) -> tuple[Side, ...]:
    """The sides that coders read and predict, each once."""
    return tuple(dict.fromkeys(side for config in configs for side in config.sides))


def k_error(config: CoderConfig, k: int, latents: int | None) -> str | None:
    """Why such a coder cannot be run with this K; None where it can, as far as `latents` tell."""
    if config.k is None:
        return f"k has no effect on arch={config.arch}, got k={k}; remove --k"
    if k < 1:
        return f"k must be at least 1, got {k}"
    in_blocks = config.blocks != "none"
    if latents is not None:
        if k > latents:
            return (
                f"k must be at most the number of latents, got k={k}, latents={latents}; "
                "use a smaller k or more latents"
            )
        trains_in_parts = k == config.k and (in_blocks or config.begin_as == "groupmax")
        if latents % k and (config.arch == "groupmax" or trains_in_parts):
            return (
                f"k must divide the number of latents for {'blocks' if in_blocks else 'groupmax'}, "
                f"got k={k}, latents={latents}"
            )
    if in_blocks and k > config.k:
        return f"k must be at most the number of blocks, {config.k}, got {k}"
    return None


def applies_to(name: str, kind: Kind, arch: Arch) -> bool:
    """Whether a field of a recipe has an effect on such coders."""
    if name == "input_loss" and kind == "sae":
        return False
    return arch in architectures_with(name)


def is_compatible(changes: Mapping[str, Any], kind: Kind, arch: Arch) -> bool:
    """Whether such coders can be changed so: every change has an effect, and a meaning."""
    apart = changes.get("subtract") == "predicting"
    needs_apart = changes.get("blocks") in ("selecting", "predicting") and not apart
    if kind == "sae" and (changes.get("subtract") == "separate" or needs_apart):
        return False
    return all(applies_to(name, kind, arch) for name in changes)


def inapplicable_message(name: str, kinds: str, archs: str) -> str:
    """What to tell of a field that is not for such coders."""
    needed = ",".join(architectures_with(name)) + (" transcoders" if name == "input_loss" else "")
    return f"{name} has no effect on kind={kinds} with arch={archs}; it applies to {needed}"


def _side_errors(config: CoderConfig) -> Iterator[str]:
    for name in ("inputs", "targets"):
        texts = getattr(config, name)
        if len(texts) != 1:
            yield (
                f"{name} must have exactly one HOOKPOINT:input or HOOKPOINT:output, got "
                f"{','.join(texts) or 'none'}; coders of several "
                "sides (crosscoders) cannot be trained yet"
            )
        parse_side(texts[0])
    if config.kind == "sae" and config.inputs != config.targets:
        yield (
            f"kind=sae predicts what it reads, got inputs={config.inputs[0]}, "
            f"targets={config.targets[0]}; use kind=transcoder"
        )


def _range_errors(config: CoderConfig) -> Iterator[str]:
    counts = (
        "k", "expansion", "latents", "dead_rows", "shortlist_size", "shortlist_refresh",
        "micro_batch_rows",
    )  # fmt: skip
    for name in counts:
        value = getattr(config, name)
        if value is not None and value < 1:
            yield f"{name} must be at least 1, got {value}"
    if config.architecture.needs_k != (config.k is not None):
        yield (
            f"k has no effect on arch={config.arch}, got k={config.k}; remove k"
            if config.k is not None
            else f"arch={config.arch} needs k, got none; set k to the number of active latents "
            "per row"
        )
    if (config.expansion is None) == (config.latents is None):
        yield "expansion and latents both set the number of latents; give exactly one of them"
    for name in ("lr", "clip_norm", "bandwidth"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{name} must be positive and finite, got {value}"
    for name in ("auxk_alpha", "input_loss", "sparsity_weight", "shrink"):
        if not 0 <= getattr(config, name) < math.inf:
            yield f"{name} must be at least 0 and finite, got {getattr(config, name)}"
    for name in ("tolerance", "begin_share"):
        if not 0 <= getattr(config, name) < 1:
            yield f"{name} must be in [0, 1), got {getattr(config, name)}"
    for name in ("warmup_share", "decay_share", "k_decay_share"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            yield f"{name} must be in [0, 1], got {value}"
    if not 1 <= config.k_factor < math.inf:
        yield f"k_factor must be at least 1 and finite, got {config.k_factor}"


def _inapplicable_settings(config: CoderConfig) -> Iterator[str]:
    """Settings that do nothing on such a coder, or without another one."""
    for field in fields(CoderSettings):
        if _is_set(config, field.name) and not applies_to(field.name, config.kind, config.arch):
            yield inapplicable_message(field.name, config.kind, config.arch)
    for name in _SHORTLIST:
        if config.backend != "shortlist" and _is_set(config, name):
            yield (
                f"{name} applies only to backend=shortlist, got backend={config.backend}; remove "
                f"{name}"
            )
    exact = config.architecture.is_pursuit and config.backend not in ("gram", "shortlist")
    if config.score_dtype != "float32" and exact:
        yield (
            "score_dtype applies only to backend=gram and backend=shortlist, got "
            f"backend={config.backend}; remove score_dtype"
        )
    if config.resolved_optimizer == "signsgd" and config.clip_norm is not None:
        yield (
            "clip_norm has no effect on optimizer=signsgd, which uses only signs; remove clip_norm"
        )
    if config.resolved_schedule == "constant" and _is_set(config, "decay_share"):
        yield (
            "decay_share has no effect on schedule=constant; use schedule=linear or "
            "schedule=cosine, or remove decay_share"
        )
    if config.start != "mean" and not config.bias:
        yield f"start={config.start} needs a coder with biases, got bias=False; remove one of them"
    for name, partner in (("begin_as", "begin_share"), ("k_factor", "k_decay_share")):
        if _is_set(config, name) != _is_set(config, partner):
            yield f"{name} and {partner} need each other; give both, or neither"


def _combination_errors(config: CoderConfig) -> Iterator[str]:
    if config.kind == "sae" and config.subtract == "separate":
        yield "subtract=separate applies only to transcoders, got kind=sae; remove subtract"
    for names in (("nested", "per_step_loss"), ("multi_topk", "nested", "per_step_loss")):
        if sum(getattr(config, name) for name in names) > 1:
            yield f"{' and '.join(names)} each change the loss; use only one of them"
    if config.begin_as != "mp":
        of_pursuits = ("per_step_loss", "codes", "input_loss")
        yield from _conflicts(config, f"begin_as={config.begin_as}", of_pursuits)
        if config.begin_as == "groupmax":
            yield from _conflicts(config, "begin_as=groupmax", ("k_factor", "multi_topk"))
        if config.blocks == "predicting":
            yield "begin_as cannot be combined with blocks=predicting; remove one of them"
    if config.shrink > 0:
        if config.select != "positive":
            yield f"shrink needs select=positive, got select={config.select}; remove one of them"
        yield from _conflicts(config, "shrink", ("codes",))
        if config.normalise:
            yield (
                "shrink is in units of unscaled rows and needs normalise=False, got "
                "normalise=True; use --no-normalise"
            )
    if config.codes != "mp":
        if config.backend not in ("auto", "direct"):
            yield (
                f"codes={config.codes} needs backend=direct, got backend={config.backend}; use "
                "backend=auto"
            )
        steps_only = ("subtract", "blocks", "detach", "per_step_loss", "multi_topk")
        yield from _conflicts(config, f"codes={config.codes}", steps_only)
    if config.blocks != "none":
        if config.backend not in ("auto", "direct"):
            yield (
                f"blocks={config.blocks} needs backend=direct, got backend={config.backend}; use "
                "backend=auto or backend=direct"
            )
        yield from _conflicts(config, f"blocks={config.blocks}", ("multi_topk", "k_factor"))
        shared = config.kind == "sae" and config.subtract != "predicting"
        if shared and config.blocks != "both":
            yield (
                f"blocks={config.blocks} needs different rows in encoder and decoder, but an sae "
                "has the same rows in both; use blocks=both, subtract=predicting, or a transcoder"
            )


def _conflicts(config: CoderConfig, setting: str, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if _is_set(config, name):
            yield f"{name} cannot be combined with {setting}; remove one of them"


def _is_set(config: CoderConfig, name: str) -> bool:
    return bool(getattr(config, name) != getattr(CoderSettings, name))


def _named(name: str, value: object) -> str:
    """A field in a coder's name: `tolerance0.1`, `codes-gp`; of a switch, its name."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return dashed if value else f"no-{dashed}"
    if isinstance(value, str):
        return f"{dashed}-{value}"
    return f"{dashed}{value:g}" if isinstance(value, float) else f"{dashed}{value}"
