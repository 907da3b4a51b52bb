"""Memory for rows, lent for a stated time and used again.

Fresh memory pages would cost as much time as filling them with rows.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from mptrain.config.sides import Side
from mptrain.data.columns import Columns, RowField, Rows


@dataclass(frozen=True)
class Lease:
    """Rows of every column, for their holder alone until `release`.

    A lease that is never released keeps its memory as long as a tensor refers to it.
    """

    rows: Rows
    _free: dict[Side | RowField, deque[np.ndarray]]
    _buffers: dict[Side | RowField, np.ndarray] = field(default_factory=dict)

    def release(self) -> None:
        """Give the memory back: later leases overwrite these rows. A second call does nothing."""
        while self._buffers:
            key, buffer = self._buffers.popitem()
            self._free[key].append(buffer)


class BufferPool:
    """Leases memory for rows. It holds no more buffers than were leased at the same time.

    For a GPU, memory is page-locked, so that copies are asynchronous; PyTorch's own allocator then
    uses it again once the copies are done, and releasing a lease does nothing.
    """

    def __init__(self, columns: Columns, *, pinned: bool = False) -> None:
        self._columns, self._pinned = columns, pinned
        # appending and popping are atomic: consumers release in other threads than those that lease
        self._free: dict[Side | RowField, deque[np.ndarray]] = {key: deque() for key in columns}

    def lease(self, rows: int) -> Lease:
        """Return a lease of `rows` rows with undefined values."""
        sizes = {key: rows * column.row_bytes for key, column in self._columns.items()}
        if self._pinned:
            tensors = {
                key: torch.empty(size, dtype=torch.uint8, pin_memory=True)
                for key, size in sizes.items()
            }
            return Lease(self._view(tensors), self._free)
        buffers = {key: self._take(key, size) for key, size in sizes.items()}
        tensors = {key: torch.from_numpy(buffers[key])[:size] for key, size in sizes.items()}
        return Lease(self._view(tensors), self._free, buffers)

    def _view(self, tensors: dict[Side | RowField, Tensor]) -> Rows:
        return {key: self._columns[key].view(tensor) for key, tensor in tensors.items()}

    def _take(self, key: Side | RowField, size: int) -> Shaped[np.ndarray, " bytes"]:
        """Return a free buffer of at least `size` bytes, or a new one; drop smaller free ones."""
        free = self._free[key]
        while free:
            buffer = free.popleft()
            if len(buffer) >= size:
                return buffer
        return np.empty(max(1, size), np.uint8)  # PyTorch cannot view an empty array as rows

    @property
    def free_bytes(self) -> int:
        """Bytes of the buffers that are not on lease."""
        return sum(buffer.nbytes for free in self._free.values() for buffer in free)
