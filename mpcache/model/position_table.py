"""The position embeddings of RoBERTa and its kin, which count from the padding token's id."""

from torch import nn
from transformers import (
    PreTrainedModel,
)


def usable_positions(model: PreTrainedModel) -> int | None:
    """Positions of a model that counts from its padding token's id on; None for all others.

    RoBERTa and its kin number tokens from padding_idx + 1, so that the rows of their table up to
    there are never used: 514 rows, padding_idx 1, sequences of 512. No config says so.
    """
    table = padded_positions(model)
    if table is None or table.padding_idx is None:
        return None
    return table.num_embeddings - table.padding_idx - 1


def padded_positions(model: nn.Module) -> nn.Embedding | None:
    """The embedding of positions of a model that counts them from its padding token's id on."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        if name.endswith("position_embeddings"):
            return module
    return None


def padding_index(model: nn.Module) -> int | None:
    """The padding token of a model that counts positions from that token's id on; else None.

    RoBERTa and its kin number tokens from padding_idx + 1, and leave padding tokens out.
    """
    table = padded_positions(model)
    return None if table is None else table.padding_idx
