"""Which back end finds the atoms, and how many rows it works on at once. Sizes decide alone:
neither free memory nor companions may change a result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mptrain.config import Backend, ScoreDtype
from mptrain.pursuit.atoms import AllAnew, AllByGram, Direct, Gram, Shortlist

Finder = Direct | Gram | Shortlist

_GRAM_BYTES = 1 << 30  # largest Gram matrix, in float32, that is made unasked
# Elements of one [b, M] score matrix. On a CPU those who go through it several times a step want it
# in the L2 cache, those who multiply matrices want more rows. A GPU wants enough rows to fill it.
_CPU_ELEMENTS = {"direct": 1 << 21, "gram": 1 << 18, "shortlist": 1 << 21}
_GPU_ELEMENTS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Search:
    """How atoms are found; fields as in `CoderConfig`."""

    backend: Backend
    shortlist_size: int
    shortlist_refresh: int
    shortlist_dtype: ScoreDtype


def resolve(backend: Backend, latents: int) -> Literal["direct", "gram", "shortlist"]:
    """What `auto` stands for: gram while its matrix takes at most 1 GiB in float32, else direct."""
    if backend != "auto":
        return backend
    return "gram" if _gram_fits(latents) else "direct"


def finders(W_MD: Tensor, search: Search) -> Callable[[], Finder]:
    """Prepares what all micro-batches share; gives what makes a finder for each of them."""
    backend = resolve(search.backend, len(W_MD))
    if backend == "direct":
        return lambda: Direct(W_MD)
    if backend == "gram":
        G_MM = W_MD @ W_MD.T
        return lambda: Gram(W_MD, G_MM)
    size, refresh = min(search.shortlist_size, len(W_MD)), search.shortlist_refresh
    if search.shortlist_dtype == "bfloat16":
        low_MD = W_MD.bfloat16()
        return lambda: Shortlist(AllAnew(W_MD, low_MD), size, refresh)
    if not _gram_fits(len(W_MD)):
        return lambda: Shortlist(AllAnew(W_MD, W_MD), size, refresh)
    G_MM = W_MD @ W_MD.T
    return lambda: Shortlist(AllByGram(W_MD, G_MM), size, refresh)


def microbatch_rows(search: Search, latents: int, device: torch.device) -> int:
    """Rows whose scores, or Gram matrices of candidates, are held at once."""
    backend = resolve(search.backend, latents)
    elements = _CPU_ELEMENTS[backend] if device.type == "cpu" else _GPU_ELEMENTS
    size = min(search.shortlist_size, latents) if backend == "shortlist" else 0
    return max(1, elements // max(latents, size**2))


def _gram_fits(latents: int) -> bool:
    return 4 * latents**2 <= _GRAM_BYTES
