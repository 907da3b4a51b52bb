"""Other ways to keep rows, to measure ours beside: a plain file, Zarr itself, other tools' caches.

None of the tools is a dependency. What is written is one part's rows, again and again.
"""

import contextlib
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpcache.store.zarr_codec import GROUP, ArraySpec

CONTEXT = 256  # tokens of a sequence, where a way needs to know
_PIECE = 1 << 20
_PROMPTS = 32  # that SAELens reads at a time by default

Read = Callable[[Path], int]
"reads all rows into memory; gives their number"


@dataclass(frozen=True)
class Baseline:
    """A way to keep rows in a folder."""

    name: str
    write: Callable[[Path, Tensor, int], None]
    "a part's rows, and how many parts to write"
    read: Read


def touch(x: Tensor | np.ndarray) -> int:
    """Rows that were read, each of them looked at: a memory map alone is no read."""
    float(x[:, -1].sum())
    return len(x)


def sync_file(file: Path) -> None:
    """Force a file to the disk, whoever wrote it."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def plain_file() -> Baseline:
    """The same bytes in one file, written a megabyte at a time, synced, read into one buffer."""

    def write(folder: Path, x_RW: Tensor, parts: int) -> None:
        data = x_RW.view(torch.uint8).numpy().reshape(-1).data
        (folder / "width").write_text(str(x_RW.shape[1] * x_RW.element_size()))
        with (folder / "rows").open("wb") as file:
            for _, start in itertools.product(range(parts), range(0, len(data), _PIECE)):
                file.write(data[start : start + _PIECE])
        sync_file(folder / "rows")

    def read(folder: Path) -> int:
        buffer, size = bytearray(_PIECE), 0
        with (folder / "rows").open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
        return size // int((folder / "width").read_text())

    return Baseline("plain file", write, read)


def zarr_itself(spec: ArraySpec, threads: int, pipeline: str | None = None) -> Baseline:
    """Zarr's own writes and reads of the same array, by its default codec pipeline or another."""
    import zarr
    from zarr.storage import LocalStore

    settings = {"codec_pipeline.path": pipeline} if pipeline else {}
    if pipeline:
        import_module(pipeline.partition(".")[0])

    def opened(folder: Path, mode: str) -> Any:
        store = LocalStore(folder / GROUP, read_only=mode == "r")
        array = zarr.open_array(store, path=spec.name, mode=mode)
        found = type(array.async_array.codec_pipeline).__name__
        assert pipeline is None or pipeline.endswith(found), found
        return array

    def write(folder: Path, x_RW: Tensor, parts: int) -> None:
        for name, data in spec.metadata(parts).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        values = x_RW.view(torch.uint16) if x_RW.dtype == torch.bfloat16 else x_RW
        with zarr.config.set(settings):
            array = opened(folder, "r+")
            for start in range(0, array.shape[0], len(x_RW)):
                array[start : start + len(x_RW)] = values.numpy()

    def read(folder: Path) -> int:
        with zarr.config.set(settings), ThreadPoolExecutor(threads) as pool:
            array = opened(folder, "r")
            starts = range(0, array.shape[0], spec.chunk)
            return sum(pool.map(lambda start: touch(array[start : start + spec.chunk]), starts))

    name = f"zarr {version('zarr')}"
    return Baseline(f"{name}, zarrs {version('zarrs')}" if pipeline else name, write, read)


def saelens() -> Baseline:
    """The Arrow cache of SAELens: its own runner and its own read, with the model left out.

    It has no bfloat16: such rows are given to it as float16. It does not sync.
    """
    with _quietly():
        runners = import_module("sae_lens.cache_activations_runner")
        stores = import_module("sae_lens.training.activations_store")
        import_module("datasets").disable_progress_bars()

    def write(folder: Path, x_RW: Tensor, parts: int) -> None:
        x_RW = x_RW.half() if x_RW.dtype == torch.bfloat16 else x_RW
        (folder / "dtype").write_text(str(x_RW.dtype).removeprefix("torch."))
        with _quietly():
            _saelens_runner(runners, folder / "cache", x_RW, parts).run()

    def read(folder: Path) -> int:
        store = object.__new__(stores.ActivationsStore)
        store.cached_activations_path, store.hook_name = str(folder / "cache"), "rows"
        store.device, store.dtype = torch.device("cpu"), (folder / "dtype").read_text()
        info = import_module("datasets").load_from_disk(store.cached_activations_path)
        store.context_size, store.d_in = info.features["rows"].shape
        store.store_batch_size_prompts = math.gcd(len(info), _PROMPTS)
        store.dtype = getattr(torch, store.dtype)
        store.cached_activation_dataset = store.load_cached_activation_dataset()
        rows = 0
        with contextlib.suppress(StopIteration):
            while True:
                rows += touch(store._load_raw_llm_batch_from_cached(raise_on_epoch_end=True)[0])
        return rows

    return Baseline(f"SAELens {version('sae-lens')}", write, read)


def _saelens_runner(runners: ModuleType, path: Path, x_RW: Tensor, parts: int) -> Any:
    """A runner whose activations are ready: one shard a part."""
    from datasets import Array2D, Features, Sequence, Value

    rows, width = x_RW.shape
    context = math.gcd(rows, CONTEXT)
    runner = object.__new__(runners.CacheActivationsRunner)
    dtype = str(x_RW.dtype).removeprefix("torch.")
    runner.features = Features(
        rows=Array2D(shape=(context, width), dtype=dtype),
        token_ids=Sequence(Value(dtype="int32"), length=context),
    )
    tokens = torch.zeros(rows, dtype=torch.int64)
    runner.context_size = context
    runner.activations_store = SimpleNamespace(get_raw_llm_batch=lambda: (x_RW, tokens))
    runner.cfg = SimpleNamespace(
        new_cached_activations_path=str(path), dataset_path="", hook_name="rows", d_in=width,
        n_buffers=parts, n_batches_in_buffer=1, n_seq_in_buffer=rows // context,
        shuffle=False, hf_repo_id=None,
    )  # fmt: skip
    return runner


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What a tool says is not for our output, nor an error."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
