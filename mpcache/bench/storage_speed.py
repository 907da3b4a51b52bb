"""How fast this machine writes and reads rows in the store format, and in a plain file."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from mpcache.bench.config import StoreBenchConfig
from mpcache.bench.hardware import hardware
from mpcache.bench.storage_methods import (
    ARRAY,
    HOOKPOINT,
    StorageMethod,
    plain_file,
    store_format,
    sync_file,
)
from mpcache.config import Codec, CollectConfig
from mpcache.store.array_spec import ArraySpec
from mpcache.store.fingerprint import layout_of
from mpcache.store.object_paths import array_specs

_CTX_LEN = 256


@dataclass(frozen=True, kw_only=True)
class StoreMeasurement:
    """A method to keep rows. Rates are medians over rounds, in which the methods alternate."""

    method: str
    part_rows: int
    chunk_rows: int
    codec: Codec
    stored: float
    "bytes on disk for each byte of values"
    write_rows_per_second: float
    write_gb_per_second: float
    "GB of values, 10^9 bytes"
    cold_rows_per_second: float | None
    "read with nothing of the files in the page cache; None if they cannot be dropped from it"
    warm_rows_per_second: float
    "read again"
    warm_gb_per_second: float
    write_ratio: float
    "how many times faster the first method writes, the median over rounds"
    cold_ratio: float | None
    "how many times faster the first method reads after a drop of the page cache"
    warm_ratio: float
    "how many times faster the first method reads again"


@dataclass(frozen=True)
class StoreReport:
    """The machine, and what was measured on it."""

    hardware: str
    measurements: tuple[StoreMeasurement, ...]


@dataclass(frozen=True)
class Case:
    """A method with one layout of rows."""

    method: StorageMethod
    spec: ArraySpec

    @property
    def part_rows(self) -> int:
        return self.spec.part_shape[0]


@dataclass(frozen=True)
class Seconds:
    """Times of one case in one round."""

    write: float
    cold: float | None
    warm: float


MeasureCase = Callable[[Case, StoreBenchConfig, str | None], tuple[Seconds, int]]
"returns the times, and the bytes on disk"


def bench_store(config: StoreBenchConfig, folder: str | None = None) -> StoreReport:
    """Write and read `config.rows` random rows by all methods, in `folder`.

    `folder` is by default where temporary files go; what is written is deleted.
    """
    return measure_cases([*store_cases(config), plain_case(config)], config, folder)


def store_cases(config: StoreBenchConfig) -> list[Case]:
    """The store format, with every combination of parts, chunks and codec."""
    return [
        Case(store_format(layout, config.threads), _spec(layout, config.width))
        for layout in _layouts(config)
    ]


def plain_case(config: StoreBenchConfig) -> Case:
    """A plain file, with the first combination."""
    return Case(plain_file(), _spec(next(_layouts(config)), config.width))


def measure_case(case: Case, config: StoreBenchConfig, parent: str | None) -> tuple[Seconds, int]:
    """Seconds of a write and two reads in a folder of its own, and the bytes on disk."""
    rows = _rows(case, config)
    generator = torch.Generator().manual_seed(0)
    x_RW = torch.randn(case.part_rows, config.width, generator=generator)
    x_RW = x_RW.to(getattr(torch, config.dtype))
    with tempfile.TemporaryDirectory(dir=parent, prefix="mpcache-bench-") as name:
        folder = Path(name)
        write = _timed(lambda: case.method.write(folder, x_RW, rows // case.part_rows))
        files = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)

        def read() -> None:
            count = case.method.read(folder)
            assert count == rows, (case.method.name, count, rows)

        cold = _timed(read) if _drop_from_page_cache(files) else None
        return Seconds(write, cold, _timed(read)), size


def measure_cases(
    cases: Sequence[Case],
    config: StoreBenchConfig,
    folder: str | None = None,
    measure: MeasureCase = measure_case,
) -> StoreReport:
    """Measure all cases in every round. The first round only warms up."""
    rounds: list[list[Seconds]] = []
    sizes: list[int] = []
    for number in range(config.repeats + 1):
        results = [measure(case, config, folder) for case in cases]
        sizes = [size for _, size in results]
        if number:
            rounds.append([seconds for seconds, _ in results])
    first = [seconds[0] for seconds in rounds]
    measurements = tuple(
        _measurement(case, config, sizes[n], [seconds[n] for seconds in rounds], first)
        for n, case in enumerate(cases)
    )
    return StoreReport(hardware(torch.device("cpu")), measurements)


def _layouts(config: StoreBenchConfig) -> Iterator[CollectConfig]:
    for part_rows in config.part_rows:
        for chunk_rows in config.chunk_rows:
            for codec in config.codec:
                yield CollectConfig(
                    model="bench", dataset="random", hookpoints=(HOOKPOINT,), dtype=config.dtype,
                    ctx_len=math.gcd(part_rows, _CTX_LEN), part_rows=part_rows,
                    chunk_rows=chunk_rows, codec=codec,
                )  # fmt: skip


def _spec(layout: CollectConfig, width: int) -> ArraySpec:
    return array_specs(ARRAY, layout_of(layout, "uint16"), width)[0]


def _measurement(
    case: Case,
    config: StoreBenchConfig,
    size: int,
    times: Sequence[Seconds],
    first: Sequence[Seconds],
) -> StoreMeasurement:
    rows = _rows(case, config)
    row_bytes = config.width * getattr(torch, config.dtype).itemsize
    write, warm = median(t.write for t in times), median(t.warm for t in times)
    cold = [t.cold for t in times if t.cold is not None]
    first_cold = [t.cold for t in first if t.cold is not None]
    return StoreMeasurement(
        method=case.method.name,
        part_rows=case.part_rows,
        chunk_rows=case.spec.chunk,
        codec=case.spec.codec,
        stored=size / (rows * row_bytes),
        write_rows_per_second=rows / write,
        write_gb_per_second=rows * row_bytes / write / 1e9,
        cold_rows_per_second=rows / median(cold) if cold else None,
        warm_rows_per_second=rows / warm,
        warm_gb_per_second=rows * row_bytes / warm / 1e9,
        write_ratio=median(a.write / b.write for a, b in zip(times, first, strict=True)),
        cold_ratio=median(a / b for a, b in zip(cold, first_cold, strict=True)) if cold else None,
        warm_ratio=median(a.warm / b.warm for a, b in zip(times, first, strict=True)),
    )


def _rows(case: Case, config: StoreBenchConfig) -> int:
    """Rows that are written: those of the config, rounded up to whole parts."""
    return -(-config.rows // case.part_rows) * case.part_rows


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _drop_from_page_cache(files: Sequence[Path]) -> bool:
    """Sync files and drop them from the page cache; False if the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        sync_file(file)
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True
