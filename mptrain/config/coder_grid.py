"""What `mptrain fit` trains: a grid of coders, from one run over a store."""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from mpcache.errors import UsageError
from mptrain.config.architectures import ARCHITECTURES, Arch
from mptrain.config.checks import check_nonempty, check_unique
from mptrain.config.coder import CoderConfig, applies_to, inapplicable_message, is_compatible
from mptrain.config.coder_settings import CoderSettings
from mptrain.config.presets import PRESETS
from mptrain.config.run import RunConfig
from mptrain.config.sides import CoderSides, Kind, hookpoint_sides

_LISTS = ("kind", "arch", "k", "expansion", "lr", "seed", "preset")
_MAY_BE_EMPTY = ("hookpoints", "input", "target", "latents")


@dataclass(frozen=True, kw_only=True)
class HookpointGrid:
    """What the coders of a grid read and predict."""

    group: ClassVar[str] = "Data"

    hookpoints: tuple[str, ...] = ()
    "hookpoints of the store to train on; --kind says what each coder reads and predicts there"
    input: tuple[str, ...] = ()
    (
        "what coders read, instead of --hookpoints: HOOKPOINT:input or HOOKPOINT:output; example: "
        "layers.1.mlp:input"
    )
    target: tuple[str, ...] = ()
    "what transcoders predict from --input; example: layers.1.post_feedforward_layernorm:output"


@dataclass(frozen=True, kw_only=True)
class CoderGrid:
    """The coders of a grid: each combination of the values is one coder for each hookpoint."""

    group: ClassVar[str] = "Coder"

    kind: tuple[Kind, ...] = ("sae",)
    (
        "sae: reconstructs a hookpoint's output; transcoder: predicts the output from the input; "
        "skip-transcoder: also has a linear path"
    )
    arch: tuple[Arch, ...] = ("mp", "topk")
    "architectures; mp: matching pursuit; batch-mp, batch-topk: K latents per row on average"
    k: tuple[int, ...] = (64,)
    "active latents per row (mp: pursuit steps); no effect on relu, jumprelu, gated"
    expansion: tuple[int, ...] = (64,)
    "number of latents as a multiple of the input's width"
    latents: tuple[int, ...] = ()
    "number of latents; give it instead of --expansion"
    seed: tuple[int, ...] = (0,)
    "random seeds of the initial weights; the order of rows has its own --order-seed"
    preset: tuple[str, ...] = ("mp",)
    "named variants of the mp and batch-mp coders; `mptrain presets` lists them"


@dataclass(frozen=True, kw_only=True)
class LearningRateGrid:
    """The learning rates of a grid of coders."""

    group: ClassVar[str] = "Optimizer"

    lr: tuple[float | Literal["auto"], ...] = ("auto",)
    (
        "peak learning rates; auto: by a rule for the architecture, the optimizer, the sizes of "
        "the coder and the length of the run; the rate is printed at the start"
    )


@dataclass(frozen=True, kw_only=True)
class FitConfig(HookpointGrid, CoderGrid, LearningRateGrid, CoderSettings, RunConfig):
    """A run that trains a grid of coders in one pass over a store.

    Each combination of `hookpoints`, `kind`, `k`, `expansion` (or `latents`), `lr`, `seed` and
    `arch` is one coder; `preset` adds variants of the mp coders. The other fields hold for all
    coders. Rows are tokens: `rows` and `batch_rows` count them. The options of `mptrain fit` have
    the same names. `store`, `run` and `hookpoints` (or `input`) are required.

    Example:
        >>> from mptrain import FitConfig
        >>> config = FitConfig(
        ...     store="store", run="run", hookpoints=("layers.0",), arch=("mp",), k=(8, 16)
        ... )
        >>> [coder.name for coder in config.coders()]
        ['layers.0-sae-mp-k8-x64-seed0', 'layers.0-sae-mp-k16-x64-seed0']

    Raises:
        UsageError: a value is out of its range, or two settings contradict each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _LISTS:
            check_nonempty(name, getattr(self, name))
        for name in (*_LISTS, *_MAY_BE_EMPTY):
            check_unique(name, getattr(self, name))
        if self.latents and self.expansion != FitConfig.expansion:
            raise UsageError(
                f"latents and expansion both set the number of latents, got latents="
                f"{','.join(map(str, self.latents))}, expansion="
                f"{','.join(map(str, self.expansion))}; give one of them"
            )
        self._check_sides()
        self._check_presets()
        self._check_all_apply()
        self._check_names()

    def coders(self) -> tuple[CoderConfig, ...]:
        """The grid: the product of all fields that take several values."""
        grid = itertools.product(
            self.hookpoints or (None,),
            self.kind,
            self.k,
            self._sizes,
            self.lr,
            self.seed,
            self.arch,
        )
        return tuple(
            CoderConfig(
                **self._sides(hookpoint, kind),
                kind=kind,
                arch=arch,
                k=k if ARCHITECTURES[arch].needs_k else None,
                lr=None if lr == "auto" else lr,
                seed=seed,
                **size,
                **{**self._recipe(kind, arch), **changes},
            )
            for hookpoint, kind, k, size, lr, seed, arch in grid
            if ARCHITECTURES[arch].needs_k or k == self.k[0]
            for changes in self._variants(kind, arch)
        )

    def _sides(self, hookpoint: str | None, kind: Kind) -> CoderSides:
        if hookpoint is not None:
            return hookpoint_sides(hookpoint, kind)
        return {"inputs": self.input, "targets": self.target or self.input}

    @property
    def _sizes(self) -> list[dict[str, Any]]:
        if self.latents:
            return [{"latents": count} for count in self.latents]
        return [{"expansion": factor} for factor in self.expansion]

    def _recipe(self, kind: Kind, arch: Arch) -> dict[str, Any]:
        """The fields of the recipe that are for such a coder; the others keep their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(CoderSettings)
            if applies_to(f.name, kind, arch)
        }

    def _variants(self, kind: Kind, arch: Arch) -> list[Mapping[str, Any]]:
        """What each preset that is for such coders changes; other coders than mp come once."""
        if not ARCHITECTURES[arch].is_pursuit:
            return [{}]
        return [PRESETS[name] for name in self.preset if is_compatible(PRESETS[name], kind, arch)]

    def _check_sides(self) -> None:
        if self.target and not self.input:
            raise UsageError(f"target={','.join(self.target)} needs an input; give --input too")
        if bool(self.hookpoints) == bool(self.input):
            raise UsageError(
                "hookpoints is empty; give at least one hookpoint, or use --input"
                if not self.hookpoints
                else "hookpoints and input both say what coders read; give only one of them"
            )
        kinds = ",".join(kind for kind in self.kind if kind != "sae")
        if self.input and kinds and (self.target or self.input) == self.input:
            raise UsageError(
                f"kind={kinds} predicts a side other than {','.join(self.input)}; name that other "
                "side with --target, or use kind=sae"
            )

    def _check_presets(self) -> None:
        for name in self.preset:
            if name not in PRESETS:
                raise UsageError(f"preset must be one of {', '.join(PRESETS)}, got {name}")
            for field in PRESETS[name]:
                if getattr(self, field) != getattr(CoderSettings, field):
                    raise UsageError(f"preset={name} already sets {field}; remove one of them")
            pairs = [pair for pair in self._pairs() if ARCHITECTURES[pair[1]].is_pursuit]
            if name != "mp" and not any(is_compatible(PRESETS[name], *pair) for pair in pairs):
                raise UsageError(
                    f"preset={name} applies to no coder of kind={','.join(self.kind)} with "
                    f"arch={','.join(self.arch)}; remove the preset, or add a kind or an arch to "
                    "which it applies"
                )

    def _check_names(self) -> None:
        names = [coder.name for coder in self.coders()]
        twins = [name for name, count in Counter(names).items() if count > 1]
        if twins:
            raise UsageError(
                f"each coder needs a different name, got {', '.join(twins)} several times, "
                "because names show only 6 digits of each setting; give values that differ in "
                "these digits"
            )

    def _pairs(self) -> list[tuple[Kind, Arch]]:
        return list(itertools.product(self.kind, self.arch))

    def _check_all_apply(self) -> None:
        """Refuse what was set and is for none of the coders."""
        if self.k != FitConfig.k and not any(ARCHITECTURES[arch].needs_k for arch in self.arch):
            raise UsageError(f"k has no effect on arch={','.join(self.arch)}; remove --k")
        for field in fields(CoderSettings):
            is_set = getattr(self, field.name) != field.default
            if is_set and not any(applies_to(field.name, *pair) for pair in self._pairs()):
                raise UsageError(
                    inapplicable_message(field.name, ",".join(self.kind), ",".join(self.arch))
                )
