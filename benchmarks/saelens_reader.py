"""SAELens' reader of its own cache of activations, to compare with our loader."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tool_imports import import_quietly, without_noise

_PROMPTS = 32  # read at once: the number of SAELens' examples
_BUFFER_BATCHES = 20
_BATCH_ROWS = 4096


def saelens_reads(x_ND: Tensor, ctx_len: int, folder: Path) -> dict[str, Callable[[], int]]:
    """Write a cache of these rows into `folder`; give the reads in order and in mixed order.

    Each read returns its number of rows. The cache is float32 in Arrow, as SAELens writes it.

    Raises:
        ModuleNotFoundError: SAELens is not installed.
    """
    store_type = import_quietly("sae_lens.training.activations_store").ActivationsStore
    sequences, width = len(x_ND) // ctx_len, x_ND.shape[1]
    _write_arrow(x_ND[: sequences * ctx_len].view(sequences, ctx_len, width), folder)

    def open_cache() -> Any:
        return store_type(
            model=None, dataset=None, streaming=False, hook_name="rows", hook_head_index=None,
            context_size=ctx_len, d_in=width, n_batches_in_buffer=_BUFFER_BATCHES,
            total_training_tokens=0, store_batch_size_prompts=min(_PROMPTS, sequences),
            train_batch_size_tokens=min(_BATCH_ROWS, _BUFFER_BATCHES * ctx_len),
            prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
            dtype="float32", cached_activations_path=str(folder),
        )  # fmt: skip

    def read_in_order() -> int:
        cache = open_cache()
        batches = sequences // cache.store_batch_size_prompts
        return sum(len(cache.get_raw_llm_batch()[0]) for _ in range(batches))

    def read_mixed() -> int:
        cache, rows = open_cache(), 0
        with without_noise():  # SAELens warns when its cache starts again
            while rows < sequences * ctx_len:
                rows += len(next(cache))
        return rows

    name = f"SAELens {version('sae-lens')}"
    return {f"{name} in order": read_in_order, f"{name} mixed": read_mixed}


def _write_arrow(x_SLD: Tensor, folder: Path) -> None:
    from datasets import Array2D, Dataset, Features, disable_progress_bars, enable_progress_bars

    features = Features({"rows": Array2D(shape=tuple(x_SLD.shape[1:]), dtype="float32")})
    disable_progress_bars()
    Dataset.from_dict({"rows": x_SLD.float().numpy()}, features=features).save_to_disk(folder)
    enable_progress_bars()
