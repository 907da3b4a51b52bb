"""Tokens -> what the model is given, with the documents of a sequence kept apart where asked.

B: sequences in a forward pass. L: tokens in a sequence.
"""

import inspect
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpcache.tokens import Specials, position_ids

Separation = Literal["none", "positions", "mask"]


def model_inputs(
    tokens_BL: UInt[np.ndarray, "B L"],
    specials: Specials,
    separation: Separation,
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    """What a forward pass over stored tokens is given: a pure function of them."""
    inputs = {"input_ids": torch.from_numpy(tokens_BL.astype(np.int64)).to(model.device)}
    if separation != "none":
        positions_BL = torch.from_numpy(position_ids(tokens_BL, specials)).to(model.device)
        inputs["position_ids"] = positions_BL
        if separation == "mask":
            inputs["attention_mask"] = document_mask(positions_BL, model.dtype)
    return inputs


def forward_options(model: nn.Module) -> dict[str, bool]:
    """No cache, where a model knows one: beside one, restarting positions would make no mask."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


def document_mask(positions_BL: Int64[Tensor, "B L"], dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, L, L] with which tokens see their own document, both ways.

    Made on the model's device: it has L times the positions' bytes.
    """
    document_BL = (positions_BL == 0).cumsum(dim=1)
    is_other = document_BL[:, None, :, None] != document_BL[:, None, None, :]
    mask = torch.zeros(is_other.shape, dtype=dtype, device=positions_BL.device)
    return mask.masked_fill_(is_other, torch.finfo(dtype).min)


def find_separation(
    model: PreTrainedModel, cross_document_attention: bool, dtype: torch.dtype
) -> Separation:
    """What keeps the documents of a sequence apart in this model, found by trying.

    It computes in `dtype`, whatever its weights are in.

    Restarting positions do in a causal model that builds its mask by them; an encoder needs a mask,
    which would also undo a sliding window. Raises ValueError where nothing does.
    """
    if cross_document_attention:
        return "none"
    has_window = getattr(model.config.get_text_config(), "sliding_window", None) or hasattr(
        model.config, "local_attention"
    )
    ways: tuple[Separation, ...] = ("positions",) if has_window else ("positions", "mask")
    for way in ways:
        if keeps_documents_apart(model, way, dtype):
            return way
    raise ValueError(
        f"{type(model).__name__} cannot keep the documents of a sequence apart; "
        "turn cross_document_attention on"
    )


@torch.no_grad()
def keeps_documents_apart(
    model: PreTrainedModel, separation: Separation, dtype: torch.dtype
) -> bool:
    """Whether a document after another one gets the activations that it gets alone."""
    end = 3  # any token will do as the end
    tokens_BL = np.array([[11, 12, 13, 14, end, 21, 22, 23, 24, 25]], np.uint16)
    tokens_BL %= model.config.get_text_config().vocab_size
    specials = Specials(begin=None, begins="document", end=end)
    options, inputs = forward_options(model), model_inputs(tokens_BL, specials, separation, model)
    try:
        packed = model(**inputs, **options)[0][0, 5:].float()
    except (TypeError, ValueError, RuntimeError):  # takes no positions, or no such mask
        return False
    inputs = model_inputs(tokens_BL[:, 5:], specials, "none", model)
    alone = model(**inputs, **options)[0][0].float()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # a leak changes it by its own size
    return bool((packed - alone).norm() <= tolerance * alone.norm())
