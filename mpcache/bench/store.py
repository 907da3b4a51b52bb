"""How fast rows are written and read in this format, beside other ways to keep the same rows."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mpcache.bench.hardware import hardware
from mpcache.bench.ways import CONTEXT, Baseline, plain_file, saelens, sync_file, touch, zarr_itself
from mpcache.config import Codec, CollectConfig, StoreBenchConfig
from mpcache.storage.local import LocalStorage
from mpcache.store.fingerprint import create_or_check_store, layout_of
from mpcache.store.format import acts_array, array_specs, digest
from mpcache.store.reader import open_store
from mpcache.store.writer import Writer
from mpcache.store.zarr_codec import ArraySpec

ARRAY = acts_array("rows", "output")
ZARRS = "zarrs.ZarrsCodecPipeline"
HOW_TO_INSTALL = "pip install 'mpcache[peers]'"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A way to keep rows; rates are medians over rounds, in which the ways alternate."""

    way: str
    part_rows: int
    chunk_rows: int
    codec: Codec
    stored: float
    "bytes on disk for each byte of values"
    write_rows_per_second: float
    write_gb_per_second: float
    "GB of values, 10^9 bytes"
    cold_rows_per_second: float | None
    "with nothing of the files in the page cache; None where they cannot be dropped"
    warm_rows_per_second: float
    warm_gb_per_second: float
    ours_write: float
    "rows a second of the first line over this one's, the median over rounds"
    ours_cold: float | None
    ours_warm: float


@dataclass(frozen=True)
class Report:
    """What was measured, and what could not be."""

    hardware: str
    measurements: tuple[Measurement, ...]
    absent: Mapping[str, str]
    "tools that are not here, and why"


@dataclass(frozen=True)
class _Seconds:
    write: float
    cold: float | None
    warm: float


@dataclass(frozen=True)
class _Case:
    way: Baseline
    spec: ArraySpec

    @property
    def part_rows(self) -> int:
        return self.spec.part_shape[0]


def bench_store(config: StoreBenchConfig, folder: str | None = None) -> Report:
    """Write and read `config.rows` random rows in every way; the first round only warms up."""
    cases, absent = _cases(config)
    rounds: list[list[_Seconds]] = []
    sizes: list[int] = []
    for number in range(config.repeats + 1):
        measured = [_measure(case, config, folder) for case in cases]
        sizes = [size for _, size in measured]
        if number:
            rounds.append([seconds for seconds, _ in measured])
    found = [
        _told(case, config, sizes[n], [one[n] for one in rounds], [one[0] for one in rounds])
        for n, case in enumerate(cases)
    ]
    return Report(hardware(torch.device("cpu")), tuple(found), absent)


def _cases(config: StoreBenchConfig) -> tuple[list[_Case], dict[str, str]]:
    cases: list[_Case] = []
    absent: dict[str, str] = {}

    def add(name: str, spec: ArraySpec, make: Callable[[], Baseline]) -> None:
        try:
            cases.append(_Case(make(), spec))
        except ModuleNotFoundError as error:
            absent[name] = f"there is no module {error.name}"

    layouts = list(_layouts(config))
    for one in layouts:
        spec = array_specs(ARRAY, layout_of(one, "uint16"), config.width)[0]
        cases.append(_Case(_ours(one, config.threads), spec))
    spec = cases[0].spec
    cases.append(_Case(plain_file(), spec))
    if "sae-lens" in config.peers:
        add("sae-lens", spec, saelens)
    for case in cases[: len(layouts)]:
        if "zarr" in config.peers:
            add("zarr", case.spec, partial(zarr_itself, case.spec, config.threads))
        if "zarrs" in config.peers:
            add("zarrs", case.spec, partial(zarr_itself, case.spec, config.threads, ZARRS))
    return cases, absent


def _layouts(config: StoreBenchConfig) -> Iterator[CollectConfig]:
    for part_rows in config.part_rows:
        for chunk_rows in config.chunk_rows:
            for codec in config.codec:
                yield CollectConfig(
                    model="bench", dataset="random", hookpoints=("rows",), dtype=config.dtype,
                    ctx_len=math.gcd(part_rows, CONTEXT), part_rows=part_rows,
                    chunk_rows=chunk_rows, codec=codec,
                )  # fmt: skip


def _ours(config: CollectConfig, threads: int) -> Baseline:
    """All that `collect` does for the parts of one array, and what a loader does to read them."""
    layout, dtype = layout_of(config, "uint16"), getattr(torch, config.dtype)

    def write(folder: Path, x_RW: Tensor, parts: int) -> None:
        place = LocalStorage(folder / "store")
        told = {"model": {"model": config.model}, "dataset": {"dataset": config.dataset}}
        identity = {"seed": 0}
        create_or_check_store(place, config, identity, layout, told)
        writer = Writer(place, layout, digest(identity))
        writer.grow(ARRAY, parts, x_RW.shape[1])
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: writer.commit_acts(part, ARRAY, x_RW), range(parts)))

    def read(folder: Path) -> int:
        store = open_store(folder / "store")
        chunks = range(layout.part_rows // layout.chunk_rows)
        places = iter([(part, chunk) for part in store.part_numbers(ARRAY) for chunk in chunks])

        def read_some(_: int) -> int:  # as the loader does: several chunks a task, into used memory
            held = torch.empty(layout.chunk_rows, store.width("rows", "output"), dtype=dtype)
            return sum(touch(store.read_chunk("rows", "output", *one, held)) for one in places)

        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(read_some, range(threads)))

    return Baseline("mpcache", write, read)


def _measure(case: _Case, config: StoreBenchConfig, where: str | None) -> tuple[_Seconds, int]:
    """Seconds of a write and two reads in a folder of its own, and the bytes on disk."""
    rows = _rows(case, config)
    draw = torch.Generator().manual_seed(0)
    x_RW = torch.randn(case.part_rows, config.width, generator=draw)
    x_RW = x_RW.to(getattr(torch, config.dtype))
    with tempfile.TemporaryDirectory(dir=where, prefix="mpcache-bench-") as name:
        folder = Path(name)
        write = _timed(lambda: case.way.write(folder, x_RW, rows // case.part_rows))
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)

        def read() -> None:
            found = case.way.read(folder)
            assert found == rows, (case.way.name, found, rows)

        cold = _timed(read) if _drop(files) else None
        return _Seconds(write, cold, _timed(read)), size


def _told(
    case: _Case, config: StoreBenchConfig, size: int, times: list[_Seconds], ours: list[_Seconds]
) -> Measurement:
    rows = _rows(case, config)
    row_bytes = config.width * getattr(torch, config.dtype).itemsize
    write, warm = median(one.write for one in times), median(one.warm for one in times)
    cold = [one.cold for one in times if one.cold is not None]
    first = [one.cold for one in ours if one.cold is not None]
    return Measurement(
        way=case.way.name,
        part_rows=case.part_rows,
        chunk_rows=case.spec.chunk,
        codec=case.spec.codec,
        stored=size / (rows * row_bytes),
        write_rows_per_second=rows / write,
        write_gb_per_second=rows * row_bytes / write / 1e9,
        cold_rows_per_second=rows / median(cold) if cold else None,
        warm_rows_per_second=rows / warm,
        warm_gb_per_second=rows * row_bytes / warm / 1e9,
        ours_write=median(a.write / b.write for a, b in zip(times, ours, strict=True)),
        ours_cold=median(a / b for a, b in zip(cold, first, strict=True)) if cold else None,
        ours_warm=median(a.warm / b.warm for a, b in zip(times, ours, strict=True)),
    )


def _rows(case: _Case, config: StoreBenchConfig) -> int:
    return -(-config.rows // case.part_rows) * case.part_rows


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _drop(files: list[Path]) -> bool:
    """Take files out of the page cache, which only holds what is not on the disk yet."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        sync_file(file)
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True
