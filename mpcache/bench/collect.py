"""Throughput of a collection as a share of its own limit: the bare truncated forward pass."""

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
from mpcache.collection.collect import Collection, work_here
from mpcache.collection.jobs import Job, Progress
from mpcache.collection.producer import ActivationProducer, load
from mpcache.config import CollectConfig
from mpcache.data.documents import open_documents
from mpcache.model.capture import part_input
from mpcache.model.hooks import Side
from mpcache.model.skeleton import load_vocabulary
from mpcache.store.reader import open_store


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Rows a second, the medians over `repeats` alternating runs."""

    rows: int
    arrays: int
    bytes_per_row: int
    forward_rows_per_second: float
    "the model alone, up to the deepest hookpoint, nothing captured"
    collect_rows_per_second: float
    "the same with capture, write, sync, read back and marks"
    ratio: float
    "collect over forward, the median of the pairs"
    ratios: tuple[float, ...]
    hardware: str


class _Reached(Exception):
    """The deepest hookpoint was reached."""


def bench(config: CollectConfig, repeats: int = 5) -> Measurement:
    """Alternate both on `config.rows` rows in temporary stores; the first pair only warms up."""
    loaded = load(config)
    documents = open_documents(config, load_vocabulary(config, loaded.tokenizer))
    station = ActivationProducer(config, loaded)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats + 1):
            path = Path(folder) / str(number)
            collection = Collection(config, path, station.facts, loaded.tokenizer, documents)
            collection.write_tokens()
            jobs = collection.jobs(open_store(path))
            before, seconds = _forward_seconds(station, path), _collect_seconds(station, path, jobs)
            # the model alone before and after, so that a machine that slows down favours neither
            pairs.append(((before + _forward_seconds(station, path)) / 2, seconds))
    del pairs[0]
    ratios = [forward / collect for forward, collect in pairs]
    rows, widths = sum(job.rows for job in jobs), station.widths.values()
    return Measurement(
        rows=rows,
        arrays=len(widths),
        bytes_per_row=sum(widths) * getattr(torch, config.dtype).itemsize,
        forward_rows_per_second=rows / median(forward for forward, _ in pairs),
        collect_rows_per_second=rows / median(collect for _, collect in pairs),
        ratio=median(ratios),
        ratios=tuple(ratios),
        hardware=hardware(loaded.model.device),
    )


def _forward_seconds(station: ActivationProducer, path: Path) -> float:
    store = open_store(path)
    began = time.perf_counter()
    with _stop_at(station.model, station.sides[-1]), torch.no_grad(), station.computing():
        for part in store.part_numbers("tokens"):
            for batch in station.reading.batches(*part_input(store, part)):
                with contextlib.suppress(_Reached):
                    station.model(**batch.inputs, use_cache=False)
    return time.perf_counter() - began


def _collect_seconds(station: ActivationProducer, path: Path, jobs: Sequence[Job]) -> float:
    began = time.perf_counter()
    work_here(station, path, jobs, Progress(jobs, quiet=True))
    return time.perf_counter() - began


@contextlib.contextmanager
def _stop_at(model: nn.Module, side: Side) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Reached

    module = model.get_submodule(side.hookpoint)
    is_input = side.side == "input"
    register = module.register_forward_pre_hook if is_input else module.register_forward_hook
    handle = register(stop)
    try:
        yield
    finally:
        handle.remove()
