"""Tests whether a model's predictions depend on later tokens, by changing these.

L: tokens in a sequence. V: size of the vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mpcache.model.inputs import ModelInputs

Logits = Callable[[ModelInputs], Float[Tensor, "B L V"]]

_TOLERANCE = 8  # times the noise of the kernels, if they have noise


def is_causal(logits: Logits, inputs: ModelInputs) -> bool:
    """Whether the logits of a sequence keep their bits when all later tokens change.

    Kernels that work on groups of tokens, as in mixtures of experts, may change the last bits when
    the groups change. So a change is compared with the change that other tokens in *another*
    sequence of the batch cause: that change carries no information.
    """
    leak = _largest(_leak(logits, inputs, cut) for cut in _cuts(inputs))
    if leak == 0:
        return True
    pair = {name: _twice(value) for name, value in inputs.items()}
    noise = _largest(_noise(logits, pair, cut) for cut in _cuts(inputs))
    leak = _largest(_leak(logits, pair, cut) for cut in _cuts(inputs))
    return leak <= _TOLERANCE * noise


def _twice(value: Any) -> Any:
    """An argument repeated for two sequences: a tensor, or a mask for each layer type."""
    if isinstance(value, Mapping):
        return {name: _twice(mask) for name, mask in value.items()}
    return torch.cat([value, value])


def _cuts(inputs: ModelInputs) -> list[int]:
    """Where the later tokens begin. Odd numbers avoid the borders of chunks."""
    length = inputs["input_ids"].shape[1]
    cuts = {1, length // 4 | 1, length // 2 | 1, 3 * length // 4 | 1, length - 1}
    return sorted(cut for cut in cuts if 0 < cut < length)


def _leak(logits: Logits, inputs: ModelInputs, cut: int) -> float:
    """Change of the first sequence before the cut when its tokens after the cut change."""
    return _change(logits, inputs, sequence=0, cut=cut, rows=slice(0, cut))


def _noise(logits: Logits, pair: ModelInputs, cut: int) -> float:
    """Change of the first sequence when tokens of the second sequence change."""
    return _change(logits, pair, sequence=1, cut=cut, rows=slice(None))


def _change(logits: Logits, inputs: ModelInputs, *, sequence: int, cut: int, rows: slice) -> float:
    ids_BL = inputs["input_ids"].clone()
    ids_BL[sequence, cut:] = other_tokens(ids_BL[sequence])[cut:]
    before = logits(inputs)[0, rows]
    after = logits({**inputs, "input_ids": ids_BL})[0, rows]
    difference = (
        (after - before).abs().nan_to_num(0, torch.inf)
    )  # a NaN is in both, or it is a leak
    differs = after.isnan() != before.isnan()
    return torch.inf if bool(differs.any()) else float(difference.max())


def other_tokens(ids_L: Int64[Tensor, " L"]) -> Int64[Tensor, " L"]:
    """A different token for each token; from the same sequence if it has two different tokens."""
    known = torch.tensor(sorted(set(ids_L.tolist())), device=ids_L.device)
    if len(known) == 1:
        return (ids_L - 1).abs()
    return known.roll(-1)[torch.searchsorted(known, ids_L)]


def _largest(values: Iterable[float]) -> float:
    return max(values, default=0.0)
