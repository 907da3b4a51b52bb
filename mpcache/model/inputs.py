"""Tokens -> the arguments of a forward pass, with the documents of a sequence separated or not.

B: sequences in a forward pass. L: tokens in a sequence. R: tokens of documents, without padding.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer, UInt
from torch import Tensor
from transformers import PreTrainedModel

from mpcache.data.document_boundaries import position_ids
from mpcache.data.special_tokens import SpecialTokens
from mpcache.model.position_table import padding_index

PackedSeparation = Literal["positions", "mask", "causal mask"]
Separation = Literal["none", PackedSeparation, "alone", "alone with mask", "alone unpadded"]
"""How documents are separated.

none: they are not. positions: positions restart, and the model derives its mask from them.
mask, causal mask: positions restart, and the model gets a mask of documents.
alone: each document is a sequence, padded on the right. alone with mask: the model gets a mask of
the padding. alone unpadded: only documents of equal length share a batch.
"""
ModelInputs = dict[str, Any]  # tensors, or a mask for each kind of layer
PACKED_SEPARATIONS: tuple[PackedSeparation, ...] = get_args(PackedSeparation)


def model_inputs(
    tokens_BL: UInt[np.ndarray, "B L"],
    specials: SpecialTokens,
    separation: Separation,
    model: PreTrainedModel,
) -> ModelInputs:
    """The arguments of a forward pass over stored tokens: a pure function of the tokens."""
    return packed_inputs(tokens_BL, position_ids(tokens_BL, specials), separation, model)


def packed_inputs(
    tokens_BL: Integer[np.ndarray, "B L"],
    restarting_BL: Int64[np.ndarray, "B L"],
    separation: Separation,
    model: PreTrainedModel,
) -> ModelInputs:
    """The arguments of a forward pass, from the position of each token in its document."""
    inputs: ModelInputs = {"input_ids": _on_device(tokens_BL, model)}
    if separation not in PACKED_SEPARATIONS:
        return inputs
    positions_BL = _own_positions(restarting_BL, tokens_BL, padding_index(model))
    inputs["position_ids"] = _on_device(positions_BL, model)
    if separation != "positions":
        inputs["attention_mask"] = document_masks(
            _on_device(restarting_BL, model), separation == "causal mask", model
        )
    return inputs


def piece_inputs(
    pieces: Sequence[UInt[np.ndarray, " _"]], separation: Separation, model: PreTrainedModel
) -> tuple[ModelInputs, Int64[np.ndarray, " R"]]:
    """The arguments of a pass in which each piece is a sequence, padded on the right.

    Also returns the flat indices of the pieces' tokens in the padded batch, piece after piece.
    """
    lengths_B = np.array([len(piece) for piece in pieces])
    is_token_BL = np.arange(lengths_B.max()) < lengths_B[:, None]
    ids_BL = np.zeros(is_token_BL.shape, np.int64)  # any id will do as padding
    ids_BL[is_token_BL] = np.concatenate(pieces)
    return padded_inputs(ids_BL, is_token_BL, separation, model), np.flatnonzero(is_token_BL)


def padded_inputs(
    ids_BL: Int64[np.ndarray, "B L"],
    is_token_BL: Bool[np.ndarray, "B L"],
    separation: Separation,
    model: PreTrainedModel,
) -> ModelInputs:
    """The arguments of a pass over tokens with padding behind them."""
    inputs = {"input_ids": _on_device(ids_BL, model)}
    if separation == "alone with mask":
        inputs["attention_mask"] = _on_device(is_token_BL, model)
    return inputs


def document_masks(
    positions_BL: Int64[Tensor, "B L"], is_causal: bool, model: PreTrainedModel
) -> Tensor | dict[str, Tensor]:
    """The mask of documents; one for each layer type if some layers have a sliding window."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    full = document_mask(positions_BL, model.dtype, is_causal)
    if window is None or not kinds <= {"full_attention", "sliding_attention"} or len(kinds) == 0:
        return full
    sliding = document_mask(positions_BL, model.dtype, is_causal, window)
    return {"full_attention": full, "sliding_attention": sliding}


def document_mask(
    positions_BL: Int64[Tensor, "B L"],
    dtype: torch.dtype,
    is_causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Additive mask [B, 1, L, L]: tokens see their own document, if causal only up to themselves.

    `window` counts tokens as transformers does: including the token itself in a causal model, and
    on each side otherwise. The mask is on the model's device, because it is L times larger than the
    positions.
    """
    document_BL = (positions_BL == 0).cumsum(dim=1)
    is_hidden = document_BL[:, None, :, None] != document_BL[:, None, None, :]
    index_L = torch.arange(positions_BL.shape[1], device=positions_BL.device)
    distance_LL = index_L[:, None] - index_L
    if is_causal:
        is_hidden = is_hidden | (distance_LL < 0)
    if window is not None:
        is_hidden = is_hidden | (distance_LL.abs() > (window - 1 if is_causal else window))
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=positions_BL.device)
    return mask.masked_fill_(is_hidden, torch.finfo(dtype).min)


def _own_positions(
    restarting_BL: Int64[np.ndarray, "B L"],
    tokens_BL: Integer[np.ndarray, "B L"],
    padding: int | None,
) -> Int64[np.ndarray, "B L"]:
    """Positions as the model itself would number the tokens of each document alone."""
    if padding is None:
        return restarting_BL
    is_counted_BL = tokens_BL != padding
    counts_BL = is_counted_BL.cumsum(axis=1)
    first_BL = np.arange(tokens_BL.shape[1]) - restarting_BL  # where the token's document starts
    before_BL = np.take_along_axis(counts_BL - is_counted_BL, first_BL, axis=1)
    return np.where(is_counted_BL, counts_BL - before_BL + padding, padding)


def _on_device(values: np.ndarray, model: PreTrainedModel) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(model.device)
