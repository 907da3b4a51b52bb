"""Zarr, zarrs and the cache of SAELens as methods to keep rows in a folder.

Shapes: R rows of a part, W width.
"""

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.tool_imports import import_quietly, without_noise
from mpcache.bench.storage_methods import StorageMethod, touch_rows
from mpcache.store.array_spec import GROUP, ArraySpec

_CTX_LEN = 256  # tokens in a sequence of SAELens' cache
_PROMPTS = 32  # that SAELens reads at a time by default


def zarr_arrays(spec: ArraySpec, threads: int, pipeline: str | None = None) -> StorageMethod:
    """Zarr's own writes and reads of the same array, with its default codec pipeline or another."""
    import zarr
    from zarr.storage import LocalStore

    settings = {"codec_pipeline.path": pipeline} if pipeline else {}
    if pipeline:
        import_module(pipeline.partition(".")[0])

    def open_array(folder: Path, mode: str) -> Any:
        store = LocalStore(folder / GROUP, read_only=mode == "r")
        array = zarr.open_array(store, path=spec.name, mode=mode)
        used = type(array.async_array.codec_pipeline).__name__
        assert pipeline is None or pipeline.endswith(used), used
        return array

    def write(folder: Path, x_RW: Tensor, parts: int) -> None:
        for name, data in spec.metadata(parts).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        values = x_RW.view(torch.uint16) if x_RW.dtype == torch.bfloat16 else x_RW
        with zarr.config.set(settings):
            array = open_array(folder, "r+")
            for start in range(0, array.shape[0], len(x_RW)):
                array[start : start + len(x_RW)] = values.numpy()

    def read(folder: Path) -> int:
        with zarr.config.set(settings), ThreadPoolExecutor(threads) as pool:
            array = open_array(folder, "r")
            starts = range(0, array.shape[0], spec.chunk)
            return sum(
                pool.map(lambda start: touch_rows(array[start : start + spec.chunk]), starts)
            )

    name = f"zarr {version('zarr')}"
    return StorageMethod(f"{name}, zarrs {version('zarrs')}" if pipeline else name, write, read)


def saelens_cache() -> StorageMethod:
    """The Arrow cache of SAELens: written and read by its own code, without a model.

    SAELens has no bfloat16, so such rows are stored as float16. It does not sync its files.
    """
    runners = import_quietly("sae_lens.cache_activations_runner")
    stores = import_quietly("sae_lens.training.activations_store")
    import_quietly("datasets").disable_progress_bars()

    def write(folder: Path, x_RW: Tensor, parts: int) -> None:
        x_RW = x_RW.half() if x_RW.dtype == torch.bfloat16 else x_RW
        (folder / "dtype").write_text(str(x_RW.dtype).removeprefix("torch."))
        with without_noise():
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
                rows += touch_rows(
                    store._load_raw_llm_batch_from_cached(raise_on_epoch_end=True)[0]
                )
        return rows

    return StorageMethod(f"SAELens {version('sae-lens')}", write, read)


def _saelens_runner(runners: ModuleType, path: Path, x_RW: Tensor, parts: int) -> Any:
    """A runner that gets its activations from us: one shard for each part."""
    from datasets import Array2D, Features, Sequence, Value

    rows, width = x_RW.shape
    context = math.gcd(rows, _CTX_LEN)
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
