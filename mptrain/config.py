"""What `mptrain fit` can be told, and the config of one coder."""

import itertools
import math
from dataclasses import MISSING, dataclass, fields
from typing import Literal

Kind = Literal["sae", "transcoder", "skip-transcoder"]
Arch = Literal["mp", "topk"]
Optimizer = Literal["adam", "muon"]
Backend = Literal["direct", "gram"]
_LISTS = ("hookpoints", "kind", "arch", "k", "expansion", "seed")
_LEAST = {
    "rows": 1,
    "batch_rows": 1,
    "skip_positions": 0,
    "order_seed": 0,
    "window_rows": 1,
    "log_every": 1,
    "eval_every": 1,
    "eval_rows": 1,
    "save_every": 1,
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a coder is trained; all coders of a run share it."""

    optimizer: Optimizer = "muon"
    "muon: for matrices, with Adam for vectors; adam: for all"
    lr: float | None = None
    "peak learning rate; None: 2e-3 for muon, 2e-4 / sqrt(latents / 2^14) for adam"
    warmup_share: float = 0.02
    "share of the train steps in which the learning rate rises linearly"
    backend: Backend = "gram"
    "how mp finds its atoms: direct computes every score anew, gram updates them (exact)"
    tolerance: float = 0.0
    "mp stops a row when its residual norm is at most this share of the first one"
    auxk_alpha: float = 0.03125
    "weight of the auxiliary loss that revives dead latents of topk (0: off)"
    dead_rows: int = 10_000_000
    "a latent that did not fire for this many rows is dead"

    def __post_init__(self) -> None:
        if self.dead_rows < 1:
            raise ValueError(f"dead_rows must be at least 1, got {self.dead_rows}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.auxk_alpha < math.inf:
            raise ValueError(f"auxk_alpha must be at least 0 and finite, got {self.auxk_alpha}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share must be in [0, 1], got {self.warmup_share}")


@dataclass(frozen=True, kw_only=True)
class CoderConfig(Training):
    """One coder: its place, its mathematics and how it is trained. Saved beside its weights."""

    hookpoint: str
    "hookpoint whose rows it codes"
    kind: Kind
    "sae: output from itself; transcoder: output from input, skip- adds a linear path"
    arch: Arch
    "mp: matching pursuit; topk: the K largest pre-activations of a linear encoder"
    k: int
    "pursuit steps (mp) or active latents (topk) per row"
    expansion: int
    "latents per dimension of the input"
    seed: int = 0
    "seed of the initial weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        """Every field that is not default; the name of its folder in a run."""
        head = (
            f"{self.hookpoint}-{self.kind}-{self.arch}-k{self.k}-x{self.expansion}-seed{self.seed}"
        )
        named = {"hookpoint", "kind", "arch", "k", "expansion", "seed"}
        rest = [
            f"{f.name.replace('_', '-')}{getattr(self, f.name):g}"
            if isinstance(getattr(self, f.name), float)
            else f"{f.name.replace('_', '-')}{getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in named
            and f.default is not MISSING
            and getattr(self, f.name) != f.default
        ]
        return "-".join([head, *rest])


@dataclass(frozen=True, kw_only=True)
class FitConfig(Training):
    """A run: the grid of coders trained in one pass over a store."""

    store: str
    "store to train from"
    run: str
    "folder of the run; made if it is missing"
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
    seed: tuple[int, ...] = (0,)
    "seeds of the initial weights; the order of rows has its own seed"
    rows: int = 10_000_000
    "rows to train on; more than the store has means further epochs, differently shuffled"
    batch_rows: int = 8192
    "rows in a train step"
    skip_positions: int = 1
    "leave out rows of the first n positions of each sequence (first tokens are outliers)"
    order_seed: int = 0
    "seed of the order in which rows are read"
    window_rows: int = 131_072
    "rows mixed in memory; two such windows are held, each row_bytes x window_rows"
    log_every: int = 10
    "train steps between lines of metrics.jsonl"
    eval_every: int = 100
    "train steps between validations"
    eval_rows: int = 65_536
    "rows of the validation split used for metrics.jsonl; results.json is of all"
    save_every: int = 200
    "train steps between saved states, from which an interrupted run goes on"
    allow_nonfinite: bool = False
    "train on a store that holds non-finite values; rows with such values are left out"
    device: str = "auto"
    "torch device; auto takes the first GPU, else the CPU"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in _LISTS:
            _refuse_empty_or_twice(name, getattr(self, name))
        if self.rows < self.batch_rows:
            raise ValueError(
                f"rows must be at least batch_rows, got rows={self.rows}, "
                f"batch_rows={self.batch_rows}"
            )
        self.coders()

    def coders(self) -> tuple[CoderConfig, ...]:
        """The grid: the product of all fields that take several values."""
        shared = {field.name: getattr(self, field.name) for field in fields(Training)}
        grid = itertools.product(
            self.hookpoints, self.kind, self.k, self.expansion, self.seed, self.arch
        )
        return tuple(
            CoderConfig(
                hookpoint=hookpoint,
                kind=kind,
                arch=arch,
                k=k,
                expansion=expansion,
                seed=seed,
                **shared,
            )
            for hookpoint, kind, k, expansion, seed, arch in grid
        )


def _refuse_empty_or_twice(name: str, values: tuple[object, ...]) -> None:
    if not values:
        raise ValueError(f"{name} is empty; name at least one value")
    if len(set(values)) < len(values):
        told = ",".join(map(str, values))
        raise ValueError(f"{name} must name each value once, got {told}")
