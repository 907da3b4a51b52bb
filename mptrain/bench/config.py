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
    "rows coded at once"
    width: int = 576
    "width of a row"
    latents: int = 9216
    "atoms of the random dictionary; a multiple of the width"
    k: int = 64
    "pursuit steps"
    coder: str | None = None
    "folder of a trained mp coder whose dictionary is used in place of a random one"
    store: str | None = None
    "store whose held-out rows are used with that coder, in place of random rows"
    shortlist_size: int = CoderSettings.shortlist_size
    "shortlist: best atoms of each row that are scored between two full searches"
    shortlist_refresh: int = CoderSettings.shortlist_refresh
    "shortlist: pursuit steps from one full search to the next"
    repeats: int = 3
    "timed rounds over all methods; one more round warms up"
    seed: int = 0
    "seed of atoms and rows"
    device: str = "auto"
    "torch device; auto takes the first GPU, else the CPU"

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
    "store to read"
    hookpoints: tuple[str, ...] = ()
    "hookpoints whose outputs are read together; default: the store's first"
    rows: int = 1_000_000
    "rows to read, in as many epochs as that takes"
    batch_rows: int = RunConfig.batch_rows
    "rows in a batch"
    window_rows: int = RunConfig.window_rows
    "rows per shuffle window"
    read_threads: int | None = None
    "threads that read, in the loader and in the bare loop; default as for fit"
    cache_dir: str | None = None
    "folder of this machine that keeps what is read: to measure a store from there"
    steps: int = 0
    "train steps from the store and from memory; 0: do not train"
    k: int = 16
    "pursuit steps or active latents per row, of the coders that are trained"
    expansion: int = 8
    "latents per dimension, of the coders that are trained"
    repeats: int = 3
    "timed rounds over all methods; one more round warms up"
    device: str = "auto"
    "torch device of batches and training; auto takes the first GPU, else the CPU"

    def __post_init__(self) -> None:
        counts = ("rows", "batch_rows", "window_rows", "read_threads", "repeats")
        check_at_least(self, {"steps": 0, **dict.fromkeys(counts, 1)})
