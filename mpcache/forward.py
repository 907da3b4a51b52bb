"""Run the model over one part's tokens and keep its rows, already in their permuted order.

Shapes: R rows of a part, W width, B sequences in a forward pass, L tokens in a sequence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpcache.hooks import Capture, Side
from mpcache.tokens import Specials, position_ids


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How the model reads sequences: batch, separation of documents, device."""

    batch_sequences: int
    separate: Specials | None
    "special tokens that tell documents apart, None where they may attend to each other"
    device: torch.device

    def inputs(self, tokens: np.ndarray) -> dict[str, Tensor]:
        """The model's arguments for tokens `[B, L]`."""
        arguments = {"input_ids": torch.from_numpy(tokens.astype(np.int64))}
        if self.separate is not None:
            arguments["position_ids"] = torch.from_numpy(position_ids(tokens, self.separate))
        return {name: value.to(self.device) for name, value in arguments.items()}


def capture_part(
    capture: Capture,
    tokens: np.ndarray,
    token_of_row: np.ndarray,
    buffers: Mapping[Side, Tensor],
    how: Pass,
    advance: Callable[[int], object],
) -> None:
    """Fill `buffers` `[R, W]` from tokens `[sequences, L]`; row r gets token `token_of_row[r]`.

    Batches never span parts, so that a part depends on nothing but its own tokens.
    `advance` is told the rows of each batch.
    """
    row_of_token = torch.from_numpy(np.argsort(token_of_row))
    start = 0
    for batch in np.split(tokens, range(how.batch_sequences, len(tokens), how.batch_sequences)):
        rows_R = row_of_token[start : start + batch.size]
        for side, value_BLW in capture.run(how.inputs(batch)).items():
            buffer_RW = buffers[side]
            buffer_RW[rows_R] = value_BLW.flatten(0, 1).to(buffer_RW)
        start += batch.size
        advance(batch.size)
