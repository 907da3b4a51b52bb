"""Batches: rows of windows, cut evenly and on the trainer's device.

Letters: B rows in a batch, N rows in a window. A side is (hookpoint, "input" or "output").
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mptrain.windows import POSITION, Fact, Rows, Side


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive rows of the stream, unfiltered, on the loader's device."""

    offset: int
    "rows of the stream before this batch"
    positions_B: Int[Tensor, " B"]
    "position of each row in its sequence"
    values: Mapping[Side, Float[Tensor, "B _"]]
    "rows of each side in the storage dtype: to be cast once they are filtered"
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
    windows: Iterable[Rows], batch_rows: int, offset: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of `batch_rows` rows across the windows' borders; only the last may be shorter."""
    begun: list[Rows] = []  # of a batch that windows share
    missing = batch_rows
    for window in windows:
        rows, at = len(window[POSITION]), 0
        while rows - at >= missing:
            end = at + missing
            # the last two may be held while the window's memory is used again
            is_copied = rows - end < 2 * batch_rows
            begun.append(_piece(window, at, end, is_copied))
            yield _on_device(begun, offset, device)
            begun, missing, at = [], batch_rows, end
            offset += batch_rows
        if at < rows:
            begun.append(_piece(window, at, rows, True))
            missing -= rows - at
        del window  # else three are alive once the next one has come
    if begun:
        yield _on_device(begun, offset, device)


def _piece(window: Rows, first: int, end: int, is_copied: bool) -> Rows:
    pieces = {key: rows[first:end] for key, rows in window.items()}
    return {key: rows.clone() for key, rows in pieces.items()} if is_copied else pieces


def _on_device(pieces: Sequence[Rows], offset: int, device: torch.device) -> Batch:
    """A batch of these pieces; on CUDA copies are queued on the default stream, as training is."""
    rows = pieces[0]
    if len(pieces) > 1:
        rows = {key: torch.cat([piece[key] for piece in pieces]) for key in rows}
    moved = {key: r.to(device, non_blocking=True) for key, r in rows.items()}
    return Batch(
        offset=offset,
        positions_B=moved.pop(POSITION),
        values={key: r for key, r in moved.items() if isinstance(key, tuple)},
        facts={key: r for key, r in moved.items() if isinstance(key, str)},
    )
