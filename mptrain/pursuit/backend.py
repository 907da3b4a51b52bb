"""Which back end finds the atoms, and how many rows it works on at once. Sizes decide alone:
neither free memory nor companions may change a result."""

from dataclasses import dataclass
from typing import Literal

import torch

from mptrain.config.coder_settings import Backend, ScoreDtype

Resolved = Literal["direct", "gram", "shortlist"]

_GRAM_BYTES = 1 << 30  # largest Gram matrix, in float32, that is made unasked
_CPU_ELEMENTS = 1 << 22  # of one [b, M] score matrix, or [b, S, D] of candidates
_GPU_ELEMENTS = 1 << 28


@dataclass(frozen=True, kw_only=True)
class AtomSearch:
    """The search for atoms; fields as in `CoderConfig`."""

    backend: Backend
    shortlist_size: int
    shortlist_refresh: int
    score_dtype: ScoreDtype


def resolve_backend(search: AtomSearch, latents: int, steps: int, in_blocks: bool) -> Resolved:
    """What `auto` stands for, where a batch takes `steps` pursuit steps, those of all rows.

    `gram` while its matrix takes at most 1 GiB in float32 and costs no more than the steps would
    alone; else `direct`. Blocks leave little to search: there it is always `direct`.
    """
    if search.backend != "auto":
        return search.backend
    fits = 4 * latents**2 <= _GRAM_BYTES and latents <= steps
    return "gram" if fits and not in_blocks else "direct"


def microbatch_rows(elements_of_a_row: int, device: torch.device) -> int:
    """Rows whose scores, or candidates, are held at once."""
    elements = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    return max(1, elements // elements_of_a_row)
