"""Run the model over one part's tokens and keep its rows, already in their permuted order.

Shapes: R rows of a part, W width, S sequences of a part, L tokens in a sequence.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt
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


Copy = Callable[[Tensor, torch.dtype], Callable[[], Tensor]]
"starts to copy values to host memory in a dtype; what it gives waits for them"


def capture_part(
    capture: Capture,
    batches: Iterator[dict[str, Tensor]],
    token_of_row: Int64[np.ndarray, " R"],
    buffers: Mapping[Side, Tensor],
    advance: Callable[[int], object],
    copy: Copy | None = None,
) -> None:
    """Fill `buffers` `[R, W]`; row r gets the part's token `token_of_row[r]`.

    With `copy` the model goes on to the next batch while a batch's values are on their way, which
    takes host memory of two batches; without it values are put into place while it waits.

    `advance` is told the rows of each batch.
    """
    row_of_token = np.argsort(token_of_row)
    start, coming = 0, None
    for inputs in batches:
        size = inputs["input_ids"].numel()
        batch = _Batch(row_of_token[start : start + size], buffers, copy)
        capture.run(inputs, batch.keep)
        if coming is not None:
            coming.land()
        coming = batch
        start += size
        advance(size)
    if coming is not None:
        coming.land()


class _Batch:
    """The rows of one forward pass, and what of them is still on its way."""

    def __init__(
        self, rows_B: Int64[np.ndarray, " B"], buffers: Mapping[Side, Tensor], copy: Copy | None
    ) -> None:
        self.rows_B, self.buffers, self.copy = rows_B, buffers, copy
        self.coming: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def keep(self, side: Side, value_BLW: Float[Tensor, "B L W"]) -> None:
        buffer_RW = self.buffers[side]
        if self.copy is None:
            scatter_(buffer_RW, self.rows_B, value_BLW)
        else:
            self.coming.append((buffer_RW, self.copy(value_BLW, buffer_RW.dtype)))

    def land(self) -> None:
        for buffer_RW, arrived in self.coming:
            scatter_(buffer_RW, self.rows_B, arrived())
        self.coming.clear()


def scatter_(
    buffer_RW: Shaped[Tensor, "R W"], rows_B: Int64[np.ndarray, " B"], x_BLW: Shaped[Tensor, "..."]
) -> None:
    """Put values, in the buffer's dtype, into the named rows.

    A row is one item of NumPy's, copied whole: four times faster than torch, value by value.
    """
    x_BW = x_BLW.flatten(0, 1).to(buffer_RW).contiguous()
    _items(buffer_RW)[rows_B] = _items(x_BW)


def _items(x_RW: Shaped[Tensor, "R W"]) -> Shaped[np.ndarray, " R"]:
    """Rows as items without a type."""
    raw = x_RW.reshape(-1).view(torch.uint8).numpy()
    return raw.view(f"V{x_RW.shape[1] * x_RW.itemsize}")
