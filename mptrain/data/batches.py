"""Batches: the rows of windows, cut evenly and moved to the trainer's device.

B rows in a batch.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mptrain.config.sides import Side
from mptrain.data.buffers import BufferPool, Lease
from mptrain.data.columns import POSITION, Columns, RowField
from mptrain.data.windows import ReadWindow


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive rows of the stream, or a process's share of them, on the loader's device.

    The rows are unfiltered. They belong to the holder of the batch until `release`.
    """

    offset: int
    "rows of the stream before this batch"
    positions_B: Int[Tensor, " B"]
    "position of each row in its sequence"
    values: Mapping[Side, Float[Tensor, "B _"]]
    "rows of each side in the dtype of the store; cast them after filtering"
    fields: Mapping[RowField, Shaped[Tensor, " B"]] = field(default_factory=dict)
    "other row fields that the loader was asked for"
    lease: Lease | None = None
    "memory of the tensors; None: memory that is not used again"

    @property
    def rows(self) -> int:
        return len(self.positions_B)

    def release(self) -> None:
        """Let the loader use the memory of this batch again, which saves time.

        The tensors of the batch, and views of them, must not be used afterwards.
        """
        if self.lease is not None:
            self.lease.release()


def release_after_use(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches; each is released when the next one is asked for."""
    for batch in batches:
        yield batch
        batch.release()


def cut_batches(
    windows: Iterable[ReadWindow],
    columns: Columns,
    batch_rows: int,
    offset: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Yield batches of `batch_rows` rows across the borders of windows; the last may be shorter.

    Where several readers share a stream, each has its own rows of every batch.
    """
    pool = BufferPool(columns, pinned=device.type == "cuda")
    lease, own_rows, filled = pool.lease(batch_rows), 0, 0
    for window in windows:
        at = 0
        while at < len(window):
            count = min(batch_rows - filled, len(window) - at)
            own_rows = window.copy_rows_(lease.rows, own_rows, at, at + count)
            filled, at = filled + count, at + count
            if filled == batch_rows:
                yield _on_device(lease, own_rows, offset, device)
                lease, own_rows, filled = pool.lease(batch_rows), 0, 0
                offset += batch_rows
    if filled:
        yield _on_device(lease, own_rows, offset, device)


def _on_device(lease: Lease, own_rows: int, offset: int, device: torch.device) -> Batch:
    """Move leased rows to a device.

    On CUDA the copies are queued on the default stream, as training is; PyTorch keeps page-locked
    memory until they are done. On other devices nothing keeps it, so the copies are waited for.
    """
    is_queued = device.type == "cuda"
    moved = {
        key: rows[:own_rows].to(device, non_blocking=is_queued) for key, rows in lease.rows.items()
    }
    return Batch(
        offset=offset,
        positions_B=moved.pop(POSITION),
        values={key: rows for key, rows in moved.items() if isinstance(key, tuple)},
        fields={key: rows for key, rows in moved.items() if isinstance(key, str)},
        lease=lease,
    )
