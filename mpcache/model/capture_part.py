"""Runs the model over the tokens of a part and keeps its rows in their permuted order.

Shapes: R rows of a part or batch, W width, S sequences of a part, L tokens in a sequence, P pieces
of documents in a part, B sequences in a batch.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mpcache.model.cut_batches import Batch
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.hooks import Capture

Copy = Callable[[Tensor, torch.dtype], Callable[[], Tensor]]
"starts a copy to host memory in a dtype; the returned function waits for it"


def capture_part(
    capture: Capture,
    batches: Iterator[Batch],
    token_of_row: Int64[np.ndarray, " R"],
    buffers: Mapping[Side, Tensor],
    advance: Callable[[int], object],
    copy: Copy | None = None,
) -> None:
    """Fill `buffers` `[R, W]`; row r gets the part's token `token_of_row[r]`.

    With `copy`, the model runs the next batch while values are copied, which needs host memory for
    two batches. Without `copy`, the model waits until the values are in the buffers.

    `advance` receives the number of rows of each finished batch.
    """
    row_of_token = np.argsort(token_of_row)
    pending = None
    for batch in batches:
        copies = _BatchCopies(row_of_token[batch.tokens], batch.kept, buffers, copy)
        capture.run(batch.inputs, copies.start)
        if pending is not None:
            pending.finish()
        pending = copies
        advance(len(batch.tokens))
    if pending is not None:
        pending.finish()


class _BatchCopies:
    """Copies of the rows of one forward pass into the buffers."""

    def __init__(
        self,
        rows_R: Int64[np.ndarray, " R"],
        kept_R: Int64[Tensor, " R"] | None,
        buffers: Mapping[Side, Tensor],
        copy: Copy | None,
    ) -> None:
        self.rows_R, self.kept_R, self.buffers, self.copy = rows_R, kept_R, buffers, copy
        self.pending: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def start(self, side: Side, value_BLW: Float[Tensor, "B L W"]) -> None:
        buffer_RW = self.buffers[side]
        x_RW = value_BLW.flatten(0, 1)
        if self.kept_R is not None:
            x_RW = x_RW.index_select(0, self.kept_R)
        if self.copy is None:
            scatter_(buffer_RW, self.rows_R, x_RW)
        else:
            self.pending.append((buffer_RW, self.copy(x_RW, buffer_RW.dtype)))

    def finish(self) -> None:
        for buffer_RW, wait in self.pending:
            scatter_(buffer_RW, self.rows_R, wait())
        self.pending.clear()


def scatter_(
    buffer_RW: Shaped[Tensor, "all W"], rows_R: Int64[np.ndarray, " R"], x_RW: Shaped[Tensor, "R W"]
) -> None:
    """Write rows into the buffer, cast to its dtype.

    NumPy copies each row as one item, which is four times faster than torch's index_copy_.
    """
    _items(buffer_RW)[rows_R] = _items(x_RW.to(buffer_RW).contiguous())


def _items(x_RW: Shaped[Tensor, "R W"]) -> Shaped[np.ndarray, " R"]:
    """Rows as NumPy items of raw bytes."""
    raw = x_RW.reshape(-1).view(torch.uint8).numpy()
    return raw.view(f"V{x_RW.shape[1] * x_RW.itemsize}")
