"""Run the model over one part's tokens and keep its rows, already in their permuted order.

Shapes: R rows of a part, W width, S sequences of a part, L tokens in a sequence.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Int64, UInt
from torch import Tensor
from transformers import PreTrainedModel

from mpcache.hooks import Capture, Side
from mpcache.inputs import Separation, model_inputs
from mpcache.tokens import Specials


class Reading:
    """How the model reads tokens: in batches of whole sequences, documents apart or not."""

    def __init__(
        self,
        model: PreTrainedModel,
        specials: Specials,
        separation: Separation,
        batch_sequences: int,
    ) -> None:
        self.model, self.specials, self.separation = model, specials, separation
        self.batch_sequences = batch_sequences

    def batches(self, tokens_SL: UInt[np.ndarray, "S L"]) -> Iterator[dict[str, Tensor]]:
        """The model's arguments, batch by batch; a part never shares one with another part."""
        cuts = range(self.batch_sequences, len(tokens_SL), self.batch_sequences)
        for batch_BL in np.split(tokens_SL, cuts):
            yield model_inputs(batch_BL, self.specials, self.separation, self.model)


def capture_part(
    capture: Capture,
    batches: Iterator[dict[str, Tensor]],
    token_of_row: Int64[np.ndarray, " R"],
    buffers: Mapping[Side, Tensor],
    advance: Callable[[int], object],
) -> None:
    """Fill `buffers` `[R, W]`; row r gets the part's token `token_of_row[r]`.

    `advance` is told the rows of each batch.
    """
    row_of_token = torch.from_numpy(np.argsort(token_of_row))
    start = 0
    for inputs in batches:
        size = inputs["input_ids"].numel()
        rows_B = row_of_token[start : start + size]
        for side, value_BLW in capture.run(inputs).items():
            buffer_RW = buffers[side]
            buffer_RW[rows_B] = value_BLW.flatten(0, 1).to(buffer_RW)
        start += size
        advance(size)
