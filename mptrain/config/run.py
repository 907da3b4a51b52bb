"""The settings of a run that do not depend on its coders, in the groups that `--help` shows."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mpcache.errors import UsageError
from mptrain.config.checks import (
    check_at_least,
    check_cache_limit,
    check_nonempty,
    check_unique,
)
from mptrain.config.coder import CoderConfig

Spread = Literal["rows", "coders"]
Log = Literal["tensorboard", "wandb"]
OnlyTokens = Literal["all", "assistant"]

_LEAST = {
    "rows": 1,
    "batch_rows": 1,
    "skip_positions": 0,
    "order_seed": 0,
    "window_rows": 1,
    "read_threads": 1,
    "log_every": 1,
    "eval_every": 1,
    "eval_rows": 1,
    "save_every": 1,
}


@dataclass(frozen=True, kw_only=True)
class ReadCacheSettings:
    """A folder on this machine that keeps what was read from a remote store."""

    group: ClassVar[str] = "Data"

    cache_dir: str | None = None
    (
        "folder on this machine that keeps the data read from a remote store, so that later reads "
        "are local"
    )
    cache_bytes: int | None = None
    (
        "maximum number of bytes in --cache-dir; default: the cache grows until only 5 % of its "
        "file system is free"
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The rows of a store that a run reads, and their order."""

    group: ClassVar[str] = "Data"

    store: str
    "store to train from: a folder, or an s3:// or gs:// URL"
    rows: int = 10_000_000
    (
        "rows to train on; if the store has fewer, training continues with more epochs, each in a "
        "new order"
    )
    batch_rows: int = 8192
    "rows in each train step"
    skip_positions: int = 1
    "exclude the rows of the first N positions of each sequence (first tokens are outliers)"
    skip_tokens: tuple[str, ...] = ()
    (
        "exclude the rows of these tokens: token ids, or the word special for all special tokens; "
        "example: 13,special"
    )
    only_tokens: OnlyTokens = "all"
    "train on the rows of all tokens, or only of tokens that the assistant wrote in a chat"
    max_norm: float | None = None
    (
        "exclude rows whose norm, in the coder's input or target, exceeds this multiple of the "
        "median norm"
    )
    order_seed: int = 0
    "random seed of the order of rows"
    window_rows: int = 131_072
    (
        "rows that are shuffled together; two such windows are in memory; another value changes "
        "the order of rows"
    )
    follow: bool = False
    (
        "accept a store that a collection still writes: wait until it has written all planned "
        "parts, then train"
    )
    allow_nonfinite: bool = False
    "accept a store with NaN or infinite values; rows with such values are excluded"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """When and on how many rows coders are evaluated during a run."""

    group: ClassVar[str] = "Evaluation"

    eval_every: int = 100
    (
        "train steps between two evaluations; up to five more evaluations show whether FVU is "
        "still falling"
    )
    eval_rows: int = 65_536
    (
        "validation rows per evaluation during training (metrics.jsonl); results.json uses all "
        "validation rows"
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run writes, and where it computes."""

    group: ClassVar[str] = "Run"

    run: str
    "folder for the config, metrics, saved states and coders of this run; created if it is missing"
    log_every: int = 10
    "train steps between two lines of metrics.jsonl"
    log: tuple[Log, ...] = ()
    "also send metrics to: tensorboard (files in RUN/tensorboard), wandb (Weights & Biases)"
    save_every: int = 200
    "train steps between two saved states; an interrupted run continues from the last one"
    max_memory: int | None = None
    (
        "maximum bytes for the coders in each process, such as 20GB; a larger grid is trained in "
        "several passes; default: no limit"
    )
    device: str = "auto"
    "torch device, such as cpu or cuda:1; auto: the first GPU, or the CPU if there is no GPU"


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How threads and processes share the work of a run."""

    group: ClassVar[str] = "Parallel"

    read_threads: int | None = None
    (
        "threads that read the store; default: number of CPU threads of torch, but at least 2 and "
        "at most 4; 8 for a bucket"
    )
    spread: Spread | None = None
    (
        "only with torchrun: divide the rows of each batch, or the coders of the grid, among the "
        "processes"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(DataSettings, ReadCacheSettings, EvaluationSettings, RunSettings, ParallelSettings):
    """A pass over a store, without the coders that it trains: see `FitConfig`, `ListedConfig`."""

    def __post_init__(self) -> None:
        check_at_least(self, _LEAST)
        check_unique("log", self.log)
        self._check_filters()
        if self.rows < self.batch_rows:
            raise UsageError(
                f"rows must be at least batch_rows, got rows={self.rows}, "
                f"batch_rows={self.batch_rows}; use a larger --rows, or a smaller --batch-rows"
            )
        check_cache_limit(self.cache_dir, self.cache_bytes)

    def _check_filters(self) -> None:
        for token in self.skip_tokens:
            if token != "special" and not token.isdecimal():
                raise UsageError(
                    f"skip_tokens must be token ids or the word special, got {token!r}"
                )
        if self.max_norm is not None and not 1 <= self.max_norm < math.inf:
            raise UsageError(
                f"max_norm must be at least 1 and finite, got {self.max_norm}; it is a multiple "
                "of the median norm"
            )

    def coders(self) -> tuple[CoderConfig, ...]:
        """The coders that are trained."""
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """Warnings about settings that are legal but probably unintended."""
        free = [coder.name for coder in self.coders() if coder.free_norm]
        warnings = [f"{name}: with free_norm a step can enlarge the residual" for name in free]
        rows_before_last_step = (self.rows // self.batch_rows - 1) * self.batch_rows
        late = [
            c
            for c in self.coders()
            if c.architecture.needs_k
            and c.auxk_alpha
            and c.dead_rows is not None
            and c.dead_rows > rows_before_last_step
        ]
        if late:
            warnings.append(
                f"latents of {late[0].name} count as dead after {late[0].dead_rows:,} rows, but "
                f"the run trains on {self.rows:,} rows only, so no dead latent will be revived; "
                f"{_how_to_revive(rows_before_last_step)}"
            )
        return warnings


def _how_to_revive(rows_before_last_step: int) -> str:
    """The remedy where latents count as dead too late; half of the rows, because filters may leave
    out the other half.
    """
    if rows_before_last_step < 2:
        return (
            "no --dead-rows is low enough for so short a run; train on more rows, "
            "or turn the auxiliary loss off with --auxk-alpha 0"
        )
    return f"use --dead-rows {rows_before_last_step // 2} or less, or train on more rows"


@dataclass(frozen=True, kw_only=True)
class ListedConfig(RunConfig):
    """A run of coders that are listed individually, as those of an experiment are."""

    listed: tuple[CoderConfig, ...]
    "the coders"

    def __post_init__(self) -> None:
        super().__post_init__()
        names = tuple(coder.name for coder in self.listed)
        check_nonempty("listed", names)
        check_unique("listed", names)

    def coders(self) -> tuple[CoderConfig, ...]:
        return self.listed
