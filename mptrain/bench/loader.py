"""Speed of reading rows from a store, quality of their mixing, and time that training waits.

Everything runs in one process and alternates with the method that it is compared with.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median

import torch
from torch import Tensor

from mptrain.bench.config import LoaderBenchConfig
from mptrain.bench.measure import Progress, median_ratio, silent, time_calls
from mptrain.config.architectures import Arch
from mptrain.config.coder import all_sides
from mptrain.config.coder_grid import FitConfig
from mptrain.config.sides import Side
from mptrain.data.batches import release_after_use
from mptrain.data.columns import SEQUENCE, RowField
from mptrain.data.filters import make_filters
from mptrain.data.loader import Batch, Loader, Store, open_store
from mptrain.data.window_plans import endless_plans
from mptrain.kernels.device import resolve_device
from mptrain.training.setup import learning_rates, make_coder_run
from mptrain.training.train_sample import TrainSample

_MIXING_BATCH_ROWS = 4096
_MIXING_BATCHES = 100
_BATCHES_IN_MEMORY = 16  # that training reads again and again

Read = Callable[[], int]
"reads rows; gives their number"


@dataclass(frozen=True, kw_only=True)
class ReadSpeed:
    """Speed of one method that reads rows of the store; medians over the rounds."""

    method: str
    rows: int
    rows_per_second: float
    loader_ratio: float
    "rows per second of the loader divided by those of this method"


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Number of sequences that the rows of a batch come from."""

    batch_rows: int
    sequences: int
    "sequences in the train split"
    distinct: float
    "sequences in a batch, mean over batches"
    perfect: float
    "expected in a perfect shuffle: sequences * (1 - (1 - 1 / sequences) ** batch_rows)"
    share: float
    "distinct / perfect"


@dataclass(frozen=True, kw_only=True)
class TrainingWait:
    """Training from the store, compared with training on batches in memory."""

    arch: str
    steps: int
    store_seconds: float
    memory_seconds: float
    ratio: float
    "store_seconds / memory_seconds, median over the rounds"
    waited_seconds: float
    "seconds that training from the store waited for rows, median; reading behind training is free"


@dataclass(frozen=True, kw_only=True)
class LoaderReport:
    """All measurements. The first of the readings is the loader, the second a bare decode loop."""

    readings: list[ReadSpeed]
    mixing: Mixing
    waiting: list[TrainingWait]


def bench_loader(config: LoaderBenchConfig, progress: Progress = silent) -> LoaderReport:
    """Measure the loader on a warm cache: a first round over everything is not counted."""
    store = open_store(config.store, config.cache_dir)
    sides = output_sides(config, store)
    archs: tuple[Arch, ...] = ("mp", "topk") if config.steps else ()
    return LoaderReport(
        readings=measure_reads(config, own_reads(config, store, sides), progress),
        mixing=measure_mixing(config, store, sides[:1]),
        waiting=[_measure_training(config, store, sides, arch, progress) for arch in archs],
    )


def output_sides(config: LoaderBenchConfig, store: Store) -> tuple[Side, ...]:
    """The sides that are read: the outputs of the chosen hookpoints, or of the store's first."""
    return tuple((name, "output") for name in config.hookpoints or store.hookpoints[:1])


def open_loader(
    config: LoaderBenchConfig,
    store: Store,
    sides: Sequence[Side],
    *,
    batch_rows: int | None = None,
    device: torch.device | None = None,
    row_fields: Sequence[RowField] = (),
) -> Loader:
    """The loader of a run with these settings; keyword arguments replace settings."""
    return Loader(
        store,
        tuple(sides),
        "train",
        batch_rows=batch_rows or config.batch_rows,
        seed=0,
        window_rows=config.window_rows,
        threads=config.read_threads,
        device=device or resolve_device(config.device),
        row_fields=row_fields,
    )


# --- reading ---


def own_reads(config: LoaderBenchConfig, store: Store, sides: Sequence[Side]) -> dict[str, Read]:
    """The loader, and the bare loop that shows how fast this machine decodes the same chunks."""
    return {
        "loader": partial(read_with_loader, config, store, sides),
        "bare decode": partial(read_bare, config, store, sides),
    }


def measure_reads(
    config: LoaderBenchConfig, reads: Mapping[str, Read], progress: Progress = silent
) -> list[ReadSpeed]:
    """Time these reads in turn; one of them is called `loader`."""
    rows: dict[str, int] = {}

    def count_rows(name: str, read: Read) -> None:
        rows[name] = read()

    calls = {name: partial(count_rows, name, read) for name, read in reads.items()}
    times = time_calls(calls, config.repeats, resolve_device(config.device), progress)
    rates = {name: [rows[name] / seconds for seconds in times[name]] for name in reads}
    return [
        ReadSpeed(
            method=name,
            rows=rows[name],
            rows_per_second=median(rates[name]),
            loader_ratio=median_ratio(rates["loader"], rates[name]),
        )
        for name in reads
    ]


def read_with_loader(config: LoaderBenchConfig, store: Store, sides: Sequence[Side]) -> int:
    """Open a loader and take batches from its first window on, epoch after epoch."""
    batches = max(1, config.rows // config.batch_rows)
    with open_loader(config, store, sides) as loader:
        taken = release_after_use(islice(loader.batches(), batches))
        return sum(batch.rows for batch in taken)


def read_bare(config: LoaderBenchConfig, store: Store, sides: Sequence[Side]) -> int:
    """Decode the chunks that the loader reads, in its order, always into the same memory."""
    with open_loader(config, store, sides) as loader:
        parts, chunk_rows, window = loader.parts, loader.chunk_rows, loader.window
        columns, threads = [loader.columns[side] for side in sides], loader.threads
    plans = endless_plans(
        [part.rows for part in parts], chunk_rows, seed=0, window=window, offset=0
    )
    chunks = (chunk for plan in plans for chunk in plan.chunks)
    remaining = iter(list(islice(chunks, -(-config.rows // chunk_rows))))

    def decode(_: int) -> int:
        # fresh memory would cost as much as reading into it
        buffers = [
            column.view(torch.empty(chunk_rows * column.row_bytes, dtype=torch.uint8))
            for column in columns
        ]
        rows = 0
        for chunk in remaining:  # each thread takes the next one; a list's iterator is thread-safe
            for column, buffer in zip(columns, buffers, strict=True):
                column.read(chunk, buffer[: chunk.rows])
            rows += chunk.rows
        return rows

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(decode, range(threads)))


def first_rows(config: LoaderBenchConfig, store: Store, side: Side, rows: int) -> Tensor:
    """At most this many rows `[rows, width]` of a side, in the order of the loader."""
    with open_loader(config, store, (side,), device=torch.device("cpu")) as loader:
        batches = loader.one_pass(min(rows, loader.rows))
        return torch.cat([batch.values[side] for batch in batches])


# --- mixing ---


def measure_mixing(
    config: LoaderBenchConfig,
    store: Store,
    sides: Sequence[Side],
    batch_rows: int = _MIXING_BATCH_ROWS,
) -> Mixing:
    """Count sequences in the first 100 batches, which come from several windows if possible."""
    with open_loader(config, store, sides, batch_rows=batch_rows, row_fields=[SEQUENCE]) as loader:
        batches = max(1, min(_MIXING_BATCHES, loader.rows // batch_rows))
        counts = [
            len(torch.unique(batch.fields[SEQUENCE])) for batch in islice(loader.batches(), batches)
        ]
        sequences = loader.rows // store.ctx_len
    distinct = sum(counts) / len(counts)
    perfect = sequences * (1 - (1 - 1 / sequences) ** batch_rows)
    return Mixing(
        batch_rows=batch_rows,
        sequences=sequences,
        distinct=distinct,
        perfect=perfect,
        share=distinct / perfect,
    )


# --- training ---


def _measure_training(
    config: LoaderBenchConfig, store: Store, sides: Sequence[Side], arch: Arch, progress: Progress
) -> TrainingWait:
    """Train an SAE for each hookpoint, from the store and from memory."""
    run = FitConfig(
        store=config.store, run="", hookpoints=tuple(hookpoint for hookpoint, _ in sides),
        arch=(arch,), k=(config.k,), expansion=(config.expansion,), batch_rows=config.batch_rows,
        rows=2 * (config.repeats + 1) * config.steps * config.batch_rows,
    )  # fmt: skip
    coders, device = run.coders(), resolve_device(config.device)
    filters = make_filters(run, store, all_sides(coders))
    rates = learning_rates(run, store)
    sample = TrainSample(filters, store)
    coder_runs = [
        make_coder_run(coder, run, sample, store, device, rates[coder.name].value)
        for coder in coders
    ]
    waited: deque[float] = deque(maxlen=config.repeats)

    def train(batches: Iterator[Batch]) -> None:
        for batch in islice(batches, config.steps):
            for coder, coder_run in zip(coders, coder_runs, strict=True):
                source, target = coder.sides
                kept = filters.kept(batch, (source, target))
                x_BD, y_BD = batch.values[source][kept], batch.values[target][kept]
                coder_run.trainer.step(x_BD.float(), y_BD.float())

    def train_from_store() -> None:
        with open_loader(config, store, sides) as loader:
            train(release_after_use(loader.batches()))
            waited.append(loader.wait_seconds)

    with open_loader(config, store, sides) as loader:
        in_memory = list(islice(loader.batches(), min(config.steps, _BATCHES_IN_MEMORY)))
    calls = {
        f"training {arch} from the store": train_from_store,
        f"training {arch} from memory": lambda: train(cycle(in_memory)),
    }
    store_seconds, memory_seconds = time_calls(calls, config.repeats, device, progress).values()
    return TrainingWait(
        arch=arch,
        steps=config.steps,
        store_seconds=median(store_seconds),
        memory_seconds=median(memory_seconds),
        ratio=median_ratio(store_seconds, memory_seconds),
        waited_seconds=median(waited),
    )
