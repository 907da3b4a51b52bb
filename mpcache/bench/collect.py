"""Throughput of a collection, as a share of its limit: the model's forward pass alone."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from mpcache.bench.hardware import hardware
from mpcache.collection.collect import collect_parts_here
from mpcache.collection.jobs import Job
from mpcache.collection.producer import ActivationProducer, load_for_collection
from mpcache.collection.progress import Progress
from mpcache.collection.store_side import Collection
from mpcache.config import CollectConfig
from mpcache.data.dataset import open_documents
from mpcache.data.tokenization import find_chat_template
from mpcache.model.cut_batches import part_input
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.model_config import load_vocabulary
from mpcache.store.object_paths import TOKENS
from mpcache.store.reader import open_store


@dataclass(frozen=True, kw_only=True)
class CollectMeasurement:
    """Rows per second: medians over `repeats` runs of each kind, which alternate."""

    rows: int
    arrays: int
    bytes_per_row: int
    forward_rows_per_second: float
    "the model alone, up to the deepest hookpoint, with nothing captured"
    collect_rows_per_second: float
    "the same with capture, write, sync, read back and marks"
    ratio: float
    "collect over forward, the median of the pairs of runs"
    ratios: tuple[float, ...]
    "of each pair of runs"
    hardware: str


class _DeepestReached(Exception):
    """The deepest hookpoint was reached."""


def bench(config: CollectConfig, repeats: int = 5) -> CollectMeasurement:
    """Measure both on `config.rows` rows in temporary stores. The first pair only warms up."""
    loaded = load_for_collection(config)
    documents = open_documents(config, load_vocabulary(config, loaded.tokenizer))
    template = find_chat_template(documents, loaded.tokenizer, config)
    producer = ActivationProducer(config, loaded)
    seconds: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats + 1):
            path = Path(folder) / str(number)
            collection = Collection(
                config, path, producer.facts, loaded.tokenizer, documents, template
            )
            collection.write_tokens()
            jobs = collection.plan.jobs(open_store(path))
            # The model alone runs before and after, so that a machine that slows down favors
            # neither.
            before = _forward_seconds(producer, path)
            collecting = _collect_seconds(producer, path, jobs)
            seconds.append(((before + _forward_seconds(producer, path)) / 2, collecting))
    del seconds[0]
    ratios = tuple(forward / collecting for forward, collecting in seconds)
    rows, widths = sum(job.rows for job in jobs), producer.widths.values()
    return CollectMeasurement(
        rows=rows,
        arrays=len(widths),
        bytes_per_row=sum(widths) * getattr(torch, config.dtype).itemsize,
        forward_rows_per_second=rows / median(forward for forward, _ in seconds),
        collect_rows_per_second=rows / median(collecting for _, collecting in seconds),
        ratio=median(ratios),
        ratios=ratios,
        hardware=hardware(loaded.model.device),
    )


def _forward_seconds(producer: ActivationProducer, path: Path) -> float:
    store = open_store(path)
    start = time.perf_counter()
    with _stop_at(producer.model, producer.sides[-1]), torch.no_grad(), producer.computing():
        for part in store.part_numbers(TOKENS):
            for batch in producer.reading.batches(*part_input(store, part)):
                with contextlib.suppress(_DeepestReached):
                    producer.model(**batch.inputs, use_cache=False)
    return time.perf_counter() - start


def _collect_seconds(producer: ActivationProducer, path: Path, jobs: Sequence[Job]) -> float:
    start = time.perf_counter()
    collect_parts_here(producer, path, jobs, Progress(jobs, quiet=True))
    return time.perf_counter() - start


@contextlib.contextmanager
def _stop_at(model: nn.Module, side: Side) -> Iterator[None]:
    """End forward passes at a side of a hookpoint."""

    def stop(*_: object) -> None:
        raise _DeepestReached

    module = model.get_submodule(side.hookpoint)
    is_input = side.side == "input"
    register = module.register_forward_pre_hook if is_input else module.register_forward_hook
    handle = register(stop)
    try:
        yield
    finally:
        handle.remove()
