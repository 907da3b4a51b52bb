"""Batches: rows of windows, cut evenly and on the trainer's device.

Letters: B rows in a batch, N rows in a window. A side is (hookpoint, "input" or "output").
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mptrain.windows import POSITION, Columns, Fact, Rows, Side

_PIECE_BYTES = 1 << 18  # gathered at once: stays in the cache between gathering and casting


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive rows of the stream, unfiltered, on the loader's device."""

    offset: int
    "rows of the stream before this batch"
    positions_B: Int[Tensor, " B"]
    "position of each row in its sequence"
    values: Mapping[Side, Float[Tensor, "B _"]]
    "float32 rows of each side"
    facts: Mapping[Fact, Shaped[Tensor, " B"]] = field(default_factory=dict)
    "what else the loader was asked for, by name"

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


def cut_batches(
    windows: Iterable[tuple[Rows, Int[Tensor, " N"]]],
    columns: Columns,
    batch_rows: int,
    offset: int,
    device: torch.device,
    gatherers: Executor,
) -> Iterator[Batch]:
    """Batches of `batch_rows` rows across the windows' borders; only the last may be shorter."""
    rows, filled = _space(columns, batch_rows, device), 0
    for window, order_N in windows:
        cuts = range(batch_rows - filled, len(order_N), batch_rows)
        for taken in order_N.tensor_split(list(cuts)):
            _gather_(rows, window, taken, filled, columns, gatherers)
            filled += len(taken)
            if filled == batch_rows:
                yield _on_device(rows, filled, offset, device)
                rows, filled = _space(columns, batch_rows, device), 0
                offset += batch_rows
    if filled:
        yield _on_device(rows, filled, offset, device)


def _space(columns: Columns, rows: int, device: torch.device) -> Rows:
    """Space for a batch; for a GPU page-locked and as stored, so that copies are asynchronous."""
    if device.type == "cuda":
        return {key: column.empty(rows, pin_memory=True) for key, column in columns.items()}
    return {
        key: column.empty(rows, dtype=torch.float32 if isinstance(key, tuple) else column.dtype)
        for key, column in columns.items()
    }


def _gather_(
    batch: Rows,
    window: Rows,
    taken: Int[Tensor, " taken"],
    at: int,
    columns: Columns,
    gatherers: Executor,
) -> None:
    """Copy the named rows of a window to the places of a batch from `at` on."""
    jobs = []
    for key, rows in batch.items():
        into, source = rows[at : at + len(taken)], window[key]
        piece = max(1, _PIECE_BYTES // columns[key].row_bytes)
        pieces = zip(torch.split(into, piece), torch.split(taken, piece), strict=True)
        jobs += [gatherers.submit(_gather_piece_, to, source, names) for to, names in pieces]
    for job in jobs:
        job.result()


def _gather_piece_(
    into: Shaped[Tensor, "taken ..."], source: Shaped[Tensor, "N ..."], names: Int[Tensor, " taken"]
) -> None:
    if into.dtype == source.dtype:
        torch.index_select(source, 0, names, out=into)
    else:
        into.copy_(source.index_select(0, names))


def _on_device(rows: Rows, filled: int, offset: int, device: torch.device) -> Batch:
    """The filled rows on the device; on a GPU the cast to float32 is made there.

    On CUDA copy and cast are queued on the default stream, where the trainer works too.
    """
    moved = {key: r[:filled].to(device, non_blocking=True) for key, r in rows.items()}
    values = {key: r.float() for key, r in moved.items() if isinstance(key, tuple)}
    return Batch(
        offset=offset,
        positions_B=moved.pop(POSITION),
        values=values,
        facts={key: r for key, r in moved.items() if isinstance(key, str)},
    )
