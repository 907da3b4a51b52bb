"""Settings of `mptrain bench` and `mptrain bench-loader`."""

from dataclasses import dataclass

from mpcache.errors import UsageError
from mptrain.config.checks import check_at_least
from mptrain.config.coder_settings import CoderSettings
from mptrain.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class PursuitBenchConfig:
    """Rows and a dictionary on which the pursuit's back ends are timed.

    Raises:
        UsageError: a count is below 1, `width` does not divide `latents`, or only one of `coder`
            and `store` is set.
    """

    rows: int = 2048
    "rows that are coded at once"
    width: int = 576
    "values per row"
    latents: int = 9216
    "latents of the random dictionary; a multiple of --width"
    k: int = 64
    "pursuit steps per row"
    coder: str | None = None
    "folder of a trained mp coder; its dictionary is measured instead of a random one; needs STORE"
    store: str | None = None
    "store whose validation rows are coded by CODER, instead of random rows"
    shortlist_size: int = CoderSettings.shortlist_size
    (
        "shortlist method: number of best latents of each row; between two full searches, only "
        "these are searched"
    )
    shortlist_refresh: int = CoderSettings.shortlist_refresh
    "shortlist method: pursuit steps from one full search to the next"
    repeats: int = 3
    "measured rounds over all methods; one more round before them is a warm-up"
    seed: int = 0
    "random seed of the dictionary and the rows"
    device: str = "auto"
    "torch device; auto: the first GPU, or the CPU if there is no GPU"

    def __post_init__(self) -> None:
        check_at_least(self, dict.fromkeys(("rows", "width", "latents", "k", "repeats"), 1))
        if self.latents % self.width:
            raise UsageError(
                f"width must divide latents, got width={self.width}, latents={self.latents}; "
                f"use {self.latents // self.width * self.width or self.width} latents"
            )
        if (self.coder is None) != (self.store is None):
            raise UsageError(
                f"coder and store go together, got coder={self.coder}, store={self.store}; "
                "give both, or neither"
            )


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig:
    """What is read from a store, and how, while the loader is timed.

    Raises:
        UsageError: a count is too small.
    """

    store: str
    "store to read: a folder, or an s3:// or gs:// URL"
    hookpoints: tuple[str, ...] = ()
    "hookpoints whose outputs are read together; default: the first hookpoint of the store"
    rows: int = 1_000_000
    "rows to read; if the store has fewer, they are read in several epochs"
    batch_rows: int = RunConfig.batch_rows
    "rows per batch"
    window_rows: int = RunConfig.window_rows
    "rows that are shuffled together"
    read_threads: int | None = None
    "threads that read the store; default: as for `mptrain fit`"
    cache_dir: str | None = None
    (
        "folder on this machine that keeps the data read from a remote store; the measured reads "
        "then come from this folder"
    )
    steps: int = 0
    (
        "number of train steps to measure, once with rows from the store and once with rows from "
        "memory; 0: do not train"
    )
    k: int = 16
    "only with --steps above 0: active latents per row of the coders that are trained"
    expansion: int = 8
    "only with --steps above 0: latents of these coders, as a multiple of the input's width"
    repeats: int = 3
    "measured rounds over all methods; one more round before them is a warm-up"
    device: str = "auto"
    "torch device of batches and training; auto: the first GPU, or the CPU if there is no GPU"

    def __post_init__(self) -> None:
        counts = ("rows", "batch_rows", "window_rows", "read_threads", "repeats")
        check_at_least(self, {"steps": 0, **dict.fromkeys(counts, 1)})
