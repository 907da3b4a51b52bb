"""What is read of each row: the values of sides, and fields such as its position or token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from mptrain.config.sides import Side
from mptrain.data.shuffle import Chunk

RowField = str
Rows = Mapping[Side | RowField, Shaped[Tensor, "_ ..."]]
"values of each side and fields of each row, all for the same rows"

POSITION: RowField = "position"
SEQUENCE: RowField = "sequence"
TOKEN: RowField = "token"
ASSISTANT: RowField = "assistant"


def norm_of(side: Side) -> RowField:
    """Return the name of the field that holds the Euclidean norm of a row on one side."""
    return f"norm of {':'.join(side)}"


@dataclass(frozen=True)
class Column:
    """A side or a row field: its shape, and the function that reads a chunk of it."""

    dtype: torch.dtype
    width: int | None
    "None: one number per row"
    read: Callable[[Chunk, Shaped[Tensor, "_ ..."]], object]
    "writes the rows of a chunk into the given tensor"

    def view(self, buffer: Shaped[Tensor, " bytes"]) -> Shaped[Tensor, "_ ..."]:
        """View bytes as rows of this column."""
        return buffer.view(self.dtype).view((-1,) if self.width is None else (-1, self.width))

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * (self.width or 1)


Columns = Mapping[Side | RowField, Column]
