"""What `mptrain fit` can be told, and the config of one coder."""

import itertools
import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

Kind = Literal["sae", "transcoder", "skip-transcoder"]
Arch = Literal["mp", "batch-mp", "topk", "batch-topk", "groupmax"]
Optimizer = Literal["adam", "muon"]
Backend = Literal["auto", "direct", "gram", "shortlist"]
ScoreDtype = Literal["float32", "bfloat16"]
Codes = Literal["mp", "gp", "omp"]

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

PURSUITS = ("mp", "batch-mp")  # architectures without an encoder

# fields of a recipe that are not for every coder
_SHORTLIST = {"shortlist_size", "shortlist_refresh", "shortlist_dtype"}
_MP = {"codes", "backend", "tolerance", "detach", "per_step_loss"} | _SHORTLIST
_MP_TRANSCODER = {"input_loss"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How coders are trained: what all coders of a run share, as far as it is for them."""

    optimizer: Optimizer = "muon"
    "muon: for matrices, with Adam for vectors; adam: for all"
    lr: float | None = None
    "peak learning rate; None: 2e-3 for muon, 2e-4 / sqrt(latents / 2^14) for adam"
    warmup_share: float = 0.02
    "share of the train steps in which the learning rate rises linearly"
    codes: Codes = "mp"
    "mp values: as steps left them; gp, omp: all fitted anew at each step, by gradient or exactly"
    backend: Backend = "auto"
    "mp atoms by direct, gram (exact) or shortlist (not); auto: gram to 16384 latents, else direct"
    shortlist_size: int = 64
    "shortlist: best atoms of each row that are looked at between two full searches"
    shortlist_refresh: int = 4
    "shortlist: pursuit steps from one search of all atoms to the next"
    shortlist_dtype: ScoreDtype = "float32"
    "shortlist: dtype of the full search; bfloat16 (for AMX, many latents) is re-scored in float32"
    tolerance: float = 0.0
    "mp stops a row when its residual norm is at most this share of the first one"
    detach: bool = False
    "mp: no gradient from a pursuit step to those before it"
    per_step_loss: bool = False
    "mp: the loss is the mean over all prefixes of the pursuit, not that of its end"
    nested: bool = False
    "the loss is the mean over predictions by the first 1/16, 1/4, 1/2 and all of the latents"
    input_loss: float = 0.0
    "mp transcoder: weight of the loss of the input that its pursuit leaves, as share of variance"
    auxk_alpha: float = 0.03125
    "weight of the auxiliary loss that revives dead latents (0: off)"
    dead_rows: int = 10_000_000
    "a latent that did not fire for this many rows is dead"


@dataclass(frozen=True, kw_only=True)
class CoderConfig(Recipe):
    """One coder: its place, its mathematics and how it is trained. Saved beside its weights."""

    hookpoint: str
    "hookpoint whose rows it codes"
    kind: Kind
    "sae: output from itself; transcoder: output from input, skip- adds a linear path"
    arch: Arch
    "mp, topk; batch-: K a row on average; groupmax: the largest latent of each of K groups"
    k: int
    "pursuit steps (mp) or active latents (topk) per row"
    expansion: int
    "latents per dimension of the input"
    seed: int = 0
    "seed of the initial weights"

    def __post_init__(self) -> None:
        for name in ("k", "expansion", "dead_rows", "shortlist_size", "shortlist_refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.auxk_alpha < math.inf:
            raise ValueError(f"auxk_alpha must be at least 0 and finite, got {self.auxk_alpha}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}")
        for name in sorted(_SHORTLIST):
            if self.backend != "shortlist" and getattr(self, name) != getattr(Recipe, name):
                raise ValueError(f"{name} is for backend shortlist, got backend {self.backend}")
        self._refuse_with_refit()
        if self.nested and self.per_step_loss:
            raise ValueError("nested and per_step_loss each replace the loss; use one of them")
        if self.input_loss < 0:
            raise ValueError(f"input_loss must not be negative, got {self.input_loss}")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share must be in [0, 1], got {self.warmup_share}")

    def _refuse_with_refit(self) -> None:
        if self.codes == "mp":
            return
        if self.backend not in ("auto", "direct"):
            raise ValueError(f"codes {self.codes} needs backend direct, got {self.backend}")
        if self.arch != "mp":
            raise ValueError(f"codes {self.codes} is for arch mp, got arch {self.arch}")
        for name in ("detach", "per_step_loss"):
            if getattr(self, name):
                raise ValueError(f"{name} is for codes mp, got codes {self.codes}")

    @property
    def name(self) -> str:
        """Every field that is not default; the name of its folder in a run."""
        head = (
            f"{self.hookpoint}-{self.kind}-{self.arch}-k{self.k}-x{self.expansion}-seed{self.seed}"
        )
        named = {"hookpoint", "kind", "arch", "k", "expansion", "seed"}
        rest = [
            _named(f.name, getattr(self, f.name))
            for f in fields(self)
            if f.name not in named
            and f.default is not MISSING
            and getattr(self, f.name) != f.default
        ]
        return "-".join([head, *rest])


@dataclass(frozen=True, kw_only=True)
class FitConfig(Recipe):
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
        self._refuse_useless()
        self.coders()

    def coders(self) -> tuple[CoderConfig, ...]:
        """The grid: the product of all fields that take several values."""
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
                **self._recipe(kind, arch),
            )
            for hookpoint, kind, k, expansion, seed, arch in grid
        )

    def _recipe(self, kind: Kind, arch: Arch) -> dict[str, Any]:
        """The fields of the recipe that are for such a coder; the others keep their defaults."""
        return {
            f.name: getattr(self, f.name) for f in fields(Recipe) if _is_for(f.name, kind, arch)
        }

    def _refuse_useless(self) -> None:
        """Refuse what was set and is for none of the coders."""
        pairs = list(itertools.product(self.kind, self.arch))
        for field in fields(Recipe):
            is_set = getattr(self, field.name) != field.default
            if is_set and not any(_is_for(field.name, *pair) for pair in pairs):
                raise ValueError(
                    f"{field.name} has no effect on kind {','.join(self.kind)} with arch "
                    f"{','.join(self.arch)}; leave it out, or train an mp "
                    f"{'transcoder' if field.name in _MP_TRANSCODER else 'coder'} too"
                )


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
    peer_rows: int = 256
    "rows on which other tools that are installed are measured beside ours; 0: they are not"
    repeats: int = 3
    "rounds over all methods, after one that only warms up"
    seed: int = 0
    "seed of atoms and rows"
    device: str = "auto"
    "torch device; auto takes the first GPU, else the CPU"

    def __post_init__(self) -> None:
        for name in ("rows", "width", "latents", "k", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.peer_rows < 0:
            raise ValueError(f"peer_rows must be at least 0, got {self.peer_rows}")
        if self.latents % self.width:
            raise ValueError(
                f"width must divide latents, got width={self.width}, latents={self.latents}; "
                f"use {self.latents // self.width * self.width or self.width} latents"
            )
        if (self.coder is None) != (self.store is None):
            raise ValueError("coder and store go together; give both, or neither")


def _is_for(name: str, kind: Kind, arch: Arch) -> bool:
    if name == "codes":
        return arch == "mp"
    if name in _MP_TRANSCODER:
        return arch in PURSUITS and kind != "sae"
    return arch in PURSUITS or name not in _MP


def _named(name: str, value: object) -> str:
    """A field in a coder's name: `tolerance0.1`; of a switch, its name."""
    dashed = name.replace("_", "-")
    if value is True:
        return dashed
    return f"{dashed}{value:g}" if isinstance(value, float) else f"{dashed}{value}"


def _refuse_empty_or_twice(name: str, values: tuple[object, ...]) -> None:
    if not values:
        raise ValueError(f"{name} is empty; name at least one value")
    if len(set(values)) < len(values):
        told = ",".join(map(str, values))
        raise ValueError(f"{name} must name each value once, got {told}")
