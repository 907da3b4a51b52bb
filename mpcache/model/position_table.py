"""The table of position embeddings in RoBERTa and its kin, indexed from the padding token's id on.

These models give the n-th token of a document the position padding_idx + n, and give padding tokens
the position padding_idx. So the rows up to padding_idx are never used: 514 rows with padding_idx 1
take sequences of 512 tokens. No config says this.
"""

from torch import nn


def usable_positions(model: nn.Module) -> int | None:
    """The number of positions for tokens; None for a model without such a table."""
    table = padded_positions(model)
    if table is None or table.padding_idx is None:
        return None
    return table.num_embeddings - table.padding_idx - 1


def padding_index(model: nn.Module) -> int | None:
    """The id of the padding token, from which positions count; None without such a table."""
    table = padded_positions(model)
    return None if table is None else table.padding_idx


def padded_positions(model: nn.Module) -> nn.Embedding | None:
    """The table; None for a model that counts positions from 0."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        if name.endswith("position_embeddings"):
            return module
    return None
