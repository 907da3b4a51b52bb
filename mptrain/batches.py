"""Batches: rows of windows, cut evenly and on the trainer's device.

Letters: B rows in a batch, N rows in a window. A side is (hookpoint, "input" or "output").
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mptrain.windows import Rows, Side, Source


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive rows of the stream, unfiltered, on the loader's device."""

    offset: int
    "rows of the stream before this batch"
    positions_B: Int[Tensor, " B"]
    "position of each row in its sequence"
    values: Mapping[Side, Float[Tensor, "B _"]]
    "float32 rows of each side"

    @property
    def rows(self) -> int:
        return len(self.positions_B)


def resolve_device(name: str) -> torch.device:
    """The device named; auto takes the first GPU, else the CPU. ValueError: there is none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # its name may be right, and no such device be here
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"device must be one of this machine, got {name!r} ({told}); use auto or cpu"
        ) from None
    return device


def kept_rows(
    batch: Batch, *, skip_positions: int, finite: Sequence[Side] = ()
) -> Bool[Tensor, " B"]:
    """Which rows a coder takes: not of the first positions, and finite on the named sides."""
    kept_B = batch.positions_B >= skip_positions
    for side in finite:
        kept_B &= batch.values[side].isfinite().all(dim=1)
    return kept_B


def cut_batches(
    windows: Iterable[tuple[Rows, Int[Tensor, " N"]]],
    source: Source,
    batch_rows: int,
    offset: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of `batch_rows` rows across the windows' borders; only the last may be shorter."""
    pinned = device.type == "cuda"  # page-locked memory lets copies run asynchronously
    rows, filled = source.empty(batch_rows, pinned=pinned), 0
    for window, order_N in windows:
        cuts = range(batch_rows - filled, len(order_N), batch_rows)
        for taken in order_N.tensor_split(list(cuts)):
            rows.gather_(window, taken, filled)
            filled += len(taken)
            if filled == batch_rows:
                yield _on_device(rows, filled, offset, device)
                rows, filled = source.empty(batch_rows, pinned=pinned), 0
                offset += batch_rows
        del window  # else three windows are alive once the next one has come
    if filled:
        yield _on_device(rows, filled, offset, device)


def _on_device(rows: Rows, filled: int, offset: int, device: torch.device) -> Batch:
    """The filled rows on the device; the cast to float32 is made there.

    On CUDA copy and cast are queued on the default stream, where the trainer works too.
    """
    return Batch(
        offset=offset,
        positions_B=rows.positions_N[:filled].to(device, non_blocking=True),
        values={
            side: values[:filled].to(device, non_blocking=True).float()
            for side, values in rows.values.items()
        },
    )
