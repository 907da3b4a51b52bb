"""How fast rows come from a store, how well they are mixed, and what training waits for them.

All of it of one side, in one process, alternating with what it is compared to.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mptrain.bench.measure import seconds
from mptrain.bench.peers import saelens_reads
from mptrain.config.architectures import Arch
from mptrain.config.fit import FitConfig
from mptrain.config.run import LoaderBenchConfig
from mptrain.data.filters import make_filters
from mptrain.data.loader import Batch, Loader, Side, Store, open_store
from mptrain.data.windows import SEQUENCE, RowField, endless_plans
from mptrain.evals.evaluate import sides_of
from mptrain.kernels.device import resolve_device
from mptrain.training.setup import make_coder_run

MIXED_ROWS = 4096  # of the batches whose mixing is looked at
_MIXED_BATCHES = 100
_HELD_BATCHES = 16  # in memory, of those that a coder is trained on


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to read rows of the store; medians over alternating repeats."""

    method: str
    rows: int
    rows_per_second: float
    loader_ratio: float
    "the loader's rows a second over these"


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How many sequences the rows of a batch come from."""

    batch_rows: int
    sequences: int
    "in the train split"
    distinct: float
    "in a batch, the mean"
    perfect: float
    "what a perfect shuffle would have, sequences * (1 - (1 - 1 / sequences) ** batch_rows)"
    share: float
    "of the perfect"


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Training from the store, and from memory on rows that were read before."""

    arch: str
    steps: int
    store_seconds: float
    memory_seconds: float
    ratio: float
    "store over memory, the median of the pairs"
    waited_seconds: float
    "of a run from the store, the median: what is hidden behind training is not in it"


@dataclass(frozen=True, kw_only=True)
class LoaderReport:
    """All measurements; the loader is the first of the readings, a bare decode loop the second."""

    readings: list[Reading]
    mixing: Mixing
    waiting: list[Waiting]
    absent: str | None
    "why SAELens was not measured"


def bench_loader(config: LoaderBenchConfig) -> LoaderReport:
    """Measure on a warm cache: a first round over everything is not counted."""
    store = open_store(config.store, config.cache_dir)
    side = (config.hookpoint or store.hookpoints[0], "output")
    with tempfile.TemporaryDirectory() as folder:
        readings, absent = _readings(config, store, side, Path(folder))
    archs: tuple[Arch, ...] = ("mp", "topk")
    return LoaderReport(
        readings=readings,
        mixing=mixing(config, store, side),
        waiting=[_waiting(config, store, side, arch) for arch in archs if config.steps],
        absent=absent,
    )


def open_loader(
    config: LoaderBenchConfig,
    store: Store,
    side: Side,
    *,
    batch_rows: int | None = None,
    device: torch.device | None = None,
    facts: Sequence[RowField] = (),
) -> Loader:
    """The loader of a run with these settings, but for what is given here."""
    return Loader(
        store,
        (side,),
        "train",
        batch_rows=batch_rows or config.batch_rows,
        seed=0,
        window_rows=config.window_rows,
        threads=config.read_threads,
        device=device or resolve_device(config.device),
        facts=facts,
    )


# --- reading ---


def _readings(
    config: LoaderBenchConfig, store: Store, side: Side, folder: Path
) -> tuple[list[Reading], str | None]:
    calls: dict[str, Callable[[], int]] = {
        "loader": partial(read_with_loader, config, store, side),
        "bare decode": partial(read_bare, config, store, side),
    }
    absent = None
    try:
        calls |= saelens_reads(_first_rows(config, store, side), store.ctx_len, folder)
    except ModuleNotFoundError as error:
        absent = f"there is no module {error.name}"
    rows: dict[str, int] = {}
    counted = {name: partial(_count, rows, name, call) for name, call in calls.items()}
    found = seconds(counted, config.repeats, resolve_device(config.device))
    rates = {name: [rows[name] / one for one in times] for name, times in found.items()}
    readings = [
        Reading(
            method=name,
            rows=rows[name],
            rows_per_second=median(rates[name]),
            loader_ratio=_ratio(rates["loader"], rates[name]),
        )
        for name in calls
    ]
    return readings, absent


def _count(rows: dict[str, int], name: str, call: Callable[[], int]) -> None:
    rows[name] = call()


def read_with_loader(config: LoaderBenchConfig, store: Store, side: Side) -> int:
    """Open a loader and take batches from it, from the first window on, epoch after epoch."""
    batches = max(1, config.rows // config.batch_rows)
    with open_loader(config, store, side) as loader:
        return sum(batch.rows for batch in islice(loader.batches(), batches))


def read_bare(config: LoaderBenchConfig, store: Store, side: Side) -> int:
    """Decode the chunks that the loader reads, in its order, each over the one before."""
    with open_loader(config, store, side) as loader:
        parts, chunk_rows, window = loader.parts, loader.chunk_rows, loader.window
        column, threads = loader.columns[side], loader.threads
    plans = endless_plans(
        [part.rows for part in parts], chunk_rows, seed=0, window=window, offset=0
    )
    chunks = (chunk for plan in plans for chunk in plan.chunks)
    wanted = iter(list(islice(chunks, -(-config.rows // chunk_rows))))

    def decode(_: int) -> int:
        # fresh memory would cost as much as reading into it
        held = column.shaped(torch.empty(chunk_rows * column.row_bytes, dtype=torch.uint8))
        rows = 0
        for chunk in wanted:  # each thread takes the next one; a list's iterator is thread-safe
            column.read(chunk, held[: chunk.rows])
            rows += chunk.rows
        return rows

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(decode, range(threads)))


def _first_rows(config: LoaderBenchConfig, store: Store, side: Side) -> Tensor:
    with open_loader(config, store, side, device=torch.device("cpu")) as loader:
        rows = min(config.peer_rows, loader.rows)
        return torch.cat([batch.values[side] for batch in loader.one_pass(rows)])


# --- mixing ---


def mixing(config: LoaderBenchConfig, store: Store, side: Side) -> Mixing:
    """Of the first batches, from several windows where the store has as many."""
    with open_loader(config, store, side, batch_rows=MIXED_ROWS, facts=[SEQUENCE]) as loader:
        batches = max(1, min(_MIXED_BATCHES, loader.rows // MIXED_ROWS))
        counts = [
            len(torch.unique(batch.facts[SEQUENCE])) for batch in islice(loader.batches(), batches)
        ]
        sequences = loader.rows // store.ctx_len
    distinct = sum(counts) / len(counts)
    perfect = sequences * (1 - (1 - 1 / sequences) ** MIXED_ROWS)
    return Mixing(
        batch_rows=MIXED_ROWS,
        sequences=sequences,
        distinct=distinct,
        perfect=perfect,
        share=distinct / perfect,
    )


# --- waiting ---


def _waiting(config: LoaderBenchConfig, store: Store, side: Side, arch: Arch) -> Waiting:
    run = FitConfig(
        store=config.store, run="", hookpoints=side[:1], arch=(arch,), k=(config.k,),
        expansion=(config.expansion,), batch_rows=config.batch_rows,
        rows=2 * (config.repeats + 1) * config.steps * config.batch_rows,
    )  # fmt: skip
    (coder,) = run.coders()
    filters, device = make_filters(run, store, sides_of(coder)), resolve_device(config.device)
    coder_run = make_coder_run(coder, run, filters, store, device)
    waited: deque[float] = deque(maxlen=config.repeats)

    def train(batches: Iterator[Batch]) -> None:
        for batch in islice(batches, config.steps):
            x_BD = batch.values[side][filters.kept(batch, sides_of(coder))].float()
            coder_run.trainer.step(x_BD, x_BD)

    def from_store() -> None:
        with open_loader(config, store, side) as loader:
            train(loader.batches())
            waited.append(loader.wait_seconds)

    with open_loader(config, store, side) as loader:
        held = list(islice(loader.batches(), min(config.steps, _HELD_BATCHES)))
    calls = {"store": from_store, "memory": lambda: train(cycle(held))}
    found = seconds(calls, config.repeats, device)
    return Waiting(
        arch=arch,
        steps=config.steps,
        store_seconds=median(found["store"]),
        memory_seconds=median(found["memory"]),
        ratio=_ratio(found["store"], found["memory"]),
        waited_seconds=median(waited),
    )


def _ratio(some: Sequence[float], others: Sequence[float]) -> float:
    return median(a / b for a, b in zip(some, others, strict=True))
