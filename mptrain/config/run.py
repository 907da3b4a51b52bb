"""What `mptrain fit` and `mptrain bench` can be told."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from mptrain.config.coder import (
    PURSUITS,
    Arch,
    CoderConfig,
    Kind,
    Recipe,
    applies_to,
    inapplicable_message,
    is_compatible,
)
from mptrain.config.presets import PRESETS

Spread = Literal["rows", "coders"]
Log = Literal["tensorboard", "wandb"]
OnlyTokens = Literal["all", "assistant"]
Peer = Literal["sae-lens", "overcomplete", "eai-sparsify"]

_LISTS = ("hookpoints", "kind", "arch", "k", "expansion", "seed", "preset")
_MAY_BE_EMPTY = ("latents", "lr")
_LEAST = {
    "rows": 1,
    "batch_rows": 1,
    "skip_positions": 0,
    "order_seed": 0,
    "window_rows": 1,
    "window_bytes": 1,
    "read_threads": 1,
    "log_every": 1,
    "eval_every": 1,
    "eval_rows": 1,
    "save_every": 1,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A pass over a store: its rows, and how what is trained on them is watched and saved."""

    store: str
    "store to train from"
    run: str
    "folder of the run; made if it is missing"
    rows: int = 10_000_000
    "rows to train on; more than the store has means further epochs, differently shuffled"
    batch_rows: int = 8192
    "rows in a train step"
    skip_positions: int = 1
    "leave out rows of the first n positions of each sequence (first tokens are outliers)"
    skip_tokens: tuple[str, ...] = ()
    "leave out rows of these tokens: ids, or special for those that the tokenizer calls so"
    only_tokens: OnlyTokens = "all"
    "whose tokens' rows to take: assistant takes those that the assistant of a chat wrote"
    max_norm: float | None = None
    "leave out rows whose norm on a side of the coder is over so many times the median"
    order_seed: int = 0
    "seed of the order in which rows are read"
    window_rows: int = 131_072
    "rows mixed in memory, in two windows; on it and order_seed the order of rows depends"
    window_bytes: int = 4_000_000_000
    "most bytes that the two windows may take; a run that needs more is refused"
    read_threads: int | None = None
    "threads that read; default one for each that computes, 2 to 4; 8 from a bucket"
    tier: str | None = None
    "folder of this machine that keeps what is read of a store that is far away, for the next time"
    tier_bytes: int | None = None
    "most bytes that are kept there; None: as long as a twentieth of its file system is free"
    follow: bool = False
    "wait until a collection that is under way has all parts that it plans"
    log_every: int = 10
    "train steps between lines of metrics.jsonl"
    log: tuple[Log, ...] = ()
    "who else gets them: tensorboard (in RUN/tensorboard), wandb (Weights & Biases)"
    eval_every: int = 100
    "train steps between validations"
    eval_rows: int = 65_536
    "rows of the validation split used for metrics.jsonl; results.json is of all"
    save_every: int = 200
    "train steps between saved states, from which an interrupted run goes on"
    save_minutes: float | None = None
    "minutes between saved states too"
    allow_nonfinite: bool = False
    "train on a store that holds non-finite values; rows with such values are left out"
    max_memory: int | None = None
    "bytes that a process's coders may take in training; more than fit go in several passes"
    device: str = "auto"
    "torch device; auto takes the first GPU, else the CPU"
    spread: Spread | None = None
    "what torchrun's processes share: the rows of each batch, or the coders of the grid"

    def __post_init__(self) -> None:
        _refuse_less(self, _LEAST)
        refuse_twice("log", self.log)
        self._refuse_filters()
        if self.rows < self.batch_rows:
            raise ValueError(
                f"rows must be at least batch_rows, got rows={self.rows}, "
                f"batch_rows={self.batch_rows}; use more --rows, or fewer --batch-rows"
            )
        refuse_lone_bound(self.tier, self.tier_bytes)
        if self.save_minutes is not None and not 0 < self.save_minutes < math.inf:
            raise ValueError(f"save_minutes must be positive and finite, got {self.save_minutes}")

    def _refuse_filters(self) -> None:
        for token in self.skip_tokens:
            if token != "special" and not token.isdecimal():
                raise ValueError(f"skip_tokens takes token ids and the word special, got {token!r}")
        if self.max_norm is not None and not 1 <= self.max_norm < math.inf:
            raise ValueError(
                f"max_norm must be at least 1 and finite, got {self.max_norm}; it is a multiple "
                "of the median norm"
            )

    def coders(self) -> tuple[CoderConfig, ...]:
        """What is trained: for each kind of run to say."""
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """What may not be meant, to be told before a run starts."""
        free = [coder.name for coder in self.coders() if coder.free_norm]
        told = [f"{name}: with free_norm a step can enlarge the residual" for name in free]
        before_last = (self.rows // self.batch_rows - 1) * self.batch_rows
        late = [c for c in self.coders() if c.auxk_alpha and c.dead_rows > before_last]
        if late:
            told.append(
                f"latents of {late[0].name} count as dead after {late[0].dead_rows:,} rows, and it "
                f"trains on {self.rows:,}: none will be revived; {self._how_to_revive(before_last)}"
            )
        return told

    def _how_to_revive(self, before_last: int) -> str:
        """What to change where latents are dead too late; filters may leave out half of the rows
        before the last train step.
        """
        if before_last < 2:
            return (
                "no --dead-rows is low enough for so short a run; train on more rows, "
                "or turn this loss off with --auxk-alpha 0"
            )
        return f"use --dead-rows {before_last // 2} or less, or train on more rows"


@dataclass(frozen=True, kw_only=True)
class FitConfig(RunConfig, Recipe):
    """A run of a grid of coders."""

    hookpoints: tuple[str, ...]
    "hookpoints of the store to train on"
    kind: tuple[Kind, ...] = ("sae",)
    "kinds of coder"
    arch: tuple[Arch, ...] = ("mp", "topk")
    "architectures"
    k: tuple[int, ...] = (64,)
    "pursuit steps or active latents per row"
    expansion: tuple[int, ...] = (64,)
    "latents per dimension of the input"
    latents: tuple[int, ...] = ()
    "numbers of latents, in place of --expansion"
    lr: tuple[float, ...] = ()
    "peak learning rates; none: muon 2e-3; adam 2e-4, signsgd 5e-3, both / sqrt(latents / 2^14)"
    seed: tuple[int, ...] = (0,)
    "seeds of the initial weights; the order of rows has its own seed"
    preset: tuple[str, ...] = ("mp",)
    "variants of the mp coders; see `mptrain presets`"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _LISTS:
            refuse_empty(name, getattr(self, name))
        for name in (*_LISTS, *_MAY_BE_EMPTY):
            refuse_twice(name, getattr(self, name))
        if self.latents and self.expansion != FitConfig.expansion:
            raise ValueError(
                f"latents and expansion each say how many latents there are, got latents="
                f"{','.join(map(str, self.latents))}, expansion="
                f"{','.join(map(str, self.expansion))}; give one of them"
            )
        self._refuse_presets()
        self._refuse_useless()
        self._refuse_equal_names()

    def coders(self) -> tuple[CoderConfig, ...]:
        """The grid: the product of all fields that take several values."""
        grid = itertools.product(
            self.hookpoints,
            self.kind,
            self.k,
            self._sizes,
            self.lr or (None,),
            self.seed,
            self.arch,
        )
        return tuple(
            CoderConfig(
                hookpoint=hookpoint,
                kind=kind,
                arch=arch,
                k=k,
                lr=lr,
                seed=seed,
                **size,
                **{**self._recipe(kind, arch), **changes},
            )
            for hookpoint, kind, k, size, lr, seed, arch in grid
            for changes in self._variants(kind, arch)
        )

    @property
    def _sizes(self) -> list[dict[str, Any]]:
        if self.latents:
            return [{"latents": count} for count in self.latents]
        return [{"expansion": factor} for factor in self.expansion]

    def _recipe(self, kind: Kind, arch: Arch) -> dict[str, Any]:
        """The fields of the recipe that are for such a coder; the others keep their defaults."""
        return {
            f.name: getattr(self, f.name) for f in fields(Recipe) if applies_to(f.name, kind, arch)
        }

    def _variants(self, kind: Kind, arch: Arch) -> list[Mapping[str, Any]]:
        """What each preset that is for such coders changes; other coders than mp come once."""
        if arch not in PURSUITS:
            return [{}]
        return [PRESETS[name] for name in self.preset if is_compatible(PRESETS[name], kind, arch)]

    def _refuse_presets(self) -> None:
        for name in self.preset:
            if name not in PRESETS:
                raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name}")
            for field in PRESETS[name]:
                if getattr(self, field) != getattr(Recipe, field):
                    raise ValueError(f"preset {name} sets {field}; give one of them, not both")
            pairs = [pair for pair in self._pairs() if pair[1] in PURSUITS]
            if name != "mp" and not any(is_compatible(PRESETS[name], *pair) for pair in pairs):
                raise ValueError(
                    f"preset {name} is for none of kind {','.join(self.kind)} with arch "
                    f"{','.join(self.arch)}; leave it out, or train other coders too"
                )

    def _refuse_equal_names(self) -> None:
        names = [coder.name for coder in self.coders()]
        twins = [name for name, count in Counter(names).items() if count > 1]
        if twins:
            raise ValueError(
                f"each coder needs a name of its own, got {', '.join(twins)} several times; "
                "numbers in names have 6 digits: give values that differ in them"
            )

    def _pairs(self) -> list[tuple[Kind, Arch]]:
        return list(itertools.product(self.kind, self.arch))

    def _refuse_useless(self) -> None:
        """Refuse what was set and is for none of the coders."""
        for field in fields(Recipe):
            is_set = getattr(self, field.name) != field.default
            if is_set and not any(applies_to(field.name, *pair) for pair in self._pairs()):
                raise ValueError(
                    inapplicable_message(field.name, ",".join(self.kind), ",".join(self.arch))
                )


@dataclass(frozen=True, kw_only=True)
class ListedConfig(RunConfig):
    """A run of coders that are named one by one: any set of them, also one that is no grid."""

    listed: tuple[CoderConfig, ...]
    "the coders"

    def __post_init__(self) -> None:
        super().__post_init__()
        names = tuple(coder.name for coder in self.listed)
        refuse_empty("listed", names)
        refuse_twice("listed", names)

    def coders(self) -> tuple[CoderConfig, ...]:
        return self.listed


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What `mptrain bench` times: random unit-norm atoms and rows made of them, or real ones."""

    rows: int = 2048
    "rows coded at once"
    width: int = 576
    "their width"
    latents: int = 9216
    "atoms; a multiple of the width"
    k: int = 64
    "pursuit steps"
    active: int | None = None
    "atoms that each planted row is made of; None: as many as pursuit steps"
    noise: float = 0.05
    "Gaussian noise of planted rows, as share of their root mean square"
    coder: str | None = None
    "folder of a trained mp coder whose dictionary to use, instead of a random one"
    store: str | None = None
    "store whose held-out rows to use with that coder, instead of planted ones"
    shortlist_size: int = Recipe.shortlist_size
    "shortlist: best atoms of each row that are looked at between two full searches"
    shortlist_refresh: int = Recipe.shortlist_refresh
    "shortlist: pursuit steps from one search of all atoms to the next"
    peers: tuple[Peer, ...] = ("sae-lens", "overcomplete", "eai-sparsify")
    "other tools to measure beside ours where they are installed"
    peer_rows: int = 256
    "rows on which they are measured (overcomplete keeps 5 MB a row at the default sizes)"
    repeats: int = 3
    "rounds over all methods, after one that only warms up"
    seed: int = 0
    "seed of atoms and rows"
    device: str = "auto"
    "torch device; auto takes the first GPU, else the CPU"

    def __post_init__(self) -> None:
        counts = ("rows", "width", "latents", "k", "peer_rows", "repeats")
        _refuse_less(self, dict.fromkeys(counts, 1))
        if self.latents % self.width:
            raise ValueError(
                f"width must divide latents, got width={self.width}, latents={self.latents}; "
                f"use {self.latents // self.width * self.width or self.width} latents"
            )
        if (self.coder is None) != (self.store is None):
            raise ValueError("coder and store go together; give both, or neither")


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig:
    """What `mptrain bench-loader` times: reading one side of a store, and training on it."""

    store: str
    "store to read"
    hookpoint: str | None = None
    "hookpoint whose output is read; None: the store's first"
    rows: int = 1_000_000
    "rows to read, in as many epochs as that takes"
    batch_rows: int = RunConfig.batch_rows
    "rows in a batch"
    window_rows: int = RunConfig.window_rows
    "rows mixed in memory"
    read_threads: int | None = None
    "threads that read, of the loader and of the bare loop; default as for fit"
    tier: str | None = None
    "folder of this machine that keeps what is read: to measure a store from there"
    peer_rows: int = 200_000
    "rows that SAELens reads from its own cache of them, where it is installed"
    steps: int = 0
    "train steps, from the store and from memory; 0: no training"
    k: int = 16
    "of the coders that are trained: pursuit steps or active latents per row"
    expansion: int = 8
    "of the coders that are trained: latents per dimension"
    repeats: int = 3
    "rounds over all methods, after one that only warms up"
    device: str = "auto"
    "torch device of batches and training; auto takes the first GPU, else the CPU"

    def __post_init__(self) -> None:
        counts = ("rows", "batch_rows", "window_rows", "read_threads", "peer_rows", "repeats")
        _refuse_less(self, {"steps": 0, **dict.fromkeys(counts, 1)})


def _refuse_less(config: object, at_least: Mapping[str, int]) -> None:
    """Raise ValueError where a field that is not None is below its least value."""
    for name, least in at_least.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def refuse_lone_bound(tier: str | None, tier_bytes: int | None) -> None:
    """Raise ValueError where there is a bound of no tier, or one that bounds nothing."""
    if tier_bytes is not None and (tier is None or tier_bytes < 1):
        raise ValueError(
            f"tier_bytes must be at least 1, and goes with a tier, got tier_bytes={tier_bytes}, "
            f"tier={tier}; name the tier's folder too"
        )


def refuse_empty(name: str, values: tuple[object, ...]) -> None:
    """Raise ValueError where there are none."""
    if not values:
        raise ValueError(f"{name} is empty; name at least one value")


def refuse_twice(name: str, values: tuple[object, ...]) -> None:
    """Raise ValueError where a value is there twice."""
    if len(set(values)) < len(values):
        told = ",".join(map(str, values))
        raise ValueError(f"{name} must name each value once, got {told}")
