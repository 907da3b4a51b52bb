"""Batches: rows of windows, cut evenly and on the trainer's device.

Letters: B rows in a batch, N rows in a window. A side is (hookpoint, "input" or "output").
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mptrain.config.sides import Side
from mptrain.data.windows import POSITION, Columns, Memory, ReadWindow, RowField, Rows


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive rows of the stream, or a share of them, unfiltered, on the loader's device."""

    offset: int
    "rows of the stream before this batch"
    positions_B: Int[Tensor, " B"]
    "position of each row in its sequence"
    values: Mapping[Side, Float[Tensor, "B _"]]
    "rows of each side in the storage dtype: to be cast once they are filtered"
    facts: Mapping[RowField, Shaped[Tensor, " B"]] = field(default_factory=dict)
    "what else the loader was asked for, by name"

    @property
    def rows(self) -> int:
        return len(self.positions_B)


def cut_batches(
    windows: Iterable[ReadWindow],
    columns: Columns,
    batch_rows: int,
    offset: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of `batch_rows` rows across the windows' borders; only the last may be shorter.

    Of several readers each has its own rows of each batch.
    """
    memory = Memory(columns, pinned=device.type == "cuda")
    begun, own, filled = memory.take(batch_rows), 0, 0
    for window in windows:
        at = 0
        while at < len(window):
            count = min(batch_rows - filled, len(window) - at)
            own = window.take_(begun, own, at, at + count)
            filled, at = filled + count, at + count
            if filled == batch_rows:
                yield _on_device(begun, own, offset, device)
                del begun  # its memory may be the one after the next
                begun, own, filled = memory.take(batch_rows), 0, 0
                offset += batch_rows
        del window  # else three are alive once the next one has come
    if filled:
        yield _on_device(begun, own, offset, device)


def _on_device(begun: Rows, own: int, offset: int, device: torch.device) -> Batch:
    """On CUDA copies are queued on the default stream, as training is; PyTorch keeps page-locked
    memory until they are done. Elsewhere nothing would, so that copies are waited for."""
    is_queued = device.type == "cuda"
    moved = {key: r[:own].to(device, non_blocking=is_queued) for key, r in begun.items()}
    return Batch(
        offset=offset,
        positions_B=moved.pop(POSITION),
        values={key: r for key, r in moved.items() if isinstance(key, tuple)},
        facts={key: r for key, r in moved.items() if isinstance(key, str)},
    )
