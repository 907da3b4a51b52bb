"""Run the model over one part's tokens and keep its rows, already in their permuted order.

Shapes: R rows of a part or batch, W width, S sequences of a part, L tokens in a sequence, P pieces
of documents in a part, B sequences in a batch.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mpcache.model.forward_batches import Batch
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.hooks import Capture

Copy = Callable[[Tensor, torch.dtype], Callable[[], Tensor]]
"starts to copy values to host memory in a dtype; what it gives waits for them"


def capture_part(
    capture: Capture,
    batches: Iterator[Batch],
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
    coming = None
    for batch in batches:
        arrivals = _Arrivals(row_of_token[batch.tokens], batch.kept, buffers, copy)
        capture.run(batch.inputs, arrivals.keep)
        if coming is not None:
            coming.land()
        coming = arrivals
        advance(len(batch.tokens))
    if coming is not None:
        coming.land()


class _Arrivals:
    """The rows of one forward pass, and what of them is still on its way."""

    def __init__(
        self,
        rows_R: Int64[np.ndarray, " R"],
        kept_R: Int64[Tensor, " R"] | None,
        buffers: Mapping[Side, Tensor],
        copy: Copy | None,
    ) -> None:
        self.rows_R, self.kept_R, self.buffers, self.copy = rows_R, kept_R, buffers, copy
        self.coming: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def keep(self, side: Side, value_BLW: Float[Tensor, "B L W"]) -> None:
        buffer_RW = self.buffers[side]
        x_RW = value_BLW.flatten(0, 1)
        if self.kept_R is not None:
            x_RW = x_RW.index_select(0, self.kept_R)
        if self.copy is None:
            scatter_(buffer_RW, self.rows_R, x_RW)
        else:
            self.coming.append((buffer_RW, self.copy(x_RW, buffer_RW.dtype)))

    def land(self) -> None:
        for buffer_RW, arrived in self.coming:
            scatter_(buffer_RW, self.rows_R, arrived())
        self.coming.clear()


def scatter_(
    buffer_RW: Shaped[Tensor, "all W"], rows_R: Int64[np.ndarray, " R"], x_RW: Shaped[Tensor, "R W"]
) -> None:
    """Put values, in the buffer's dtype, into the named rows.

    A row is one item of NumPy's, copied whole: four times faster than torch, value by value.
    """
    _items(buffer_RW)[rows_R] = _items(x_RW.to(buffer_RW).contiguous())


def _items(x_RW: Shaped[Tensor, "R W"]) -> Shaped[np.ndarray, " R"]:
    """Rows as items without a type."""
    raw = x_RW.reshape(-1).view(torch.uint8).numpy()
    return raw.view(f"V{x_RW.shape[1] * x_RW.itemsize}")
