"""Run the model over one part's tokens and keep its rows, already in their permuted order.

Shapes: R rows of a part or batch, W width, S sequences of a part, L tokens in a sequence, P pieces
of documents in a part, B sequences in a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt
from torch import Tensor
from transformers import PreTrainedModel

from mpcache.data.special_tokens import SpecialTokens
from mpcache.model.hooks import Capture, Side
from mpcache.model.inputs import ModelInputs, Separation, model_inputs, piece_inputs
from mpcache.store.reader import Store


class PartInput(NamedTuple):
    """The tokens of a part, and how the model saw them."""

    tokens_SL: UInt[np.ndarray, "S L"]
    starts_SL: Bool[np.ndarray, "S L"] | None = None
    "where pieces of documents start that the model sees alone; None: it sees sequences"
    rows: int | None = None
    "true tokens, where the last sequence is filled up; None: all"


def part_input(store: Store, part: int) -> PartInput:
    return PartInput(
        store.tokens.read_tokens(part),
        store.tokens.read_document_starts(part),
        store.tokens.token_count(part),
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """The arguments of one forward pass, and where its tokens belong."""

    inputs: ModelInputs
    tokens: Int64[np.ndarray, " R"]
    "of each row that is kept: its token, counted along the part's sequences"
    kept: Int64[Tensor, " R"] | None = None
    "where these rows are in the flat batch, on the model's device; None: all, in order"


class Reading:
    """How the model reads tokens: whole sequences, documents apart or not, or lone documents."""

    def __init__(
        self,
        model: PreTrainedModel,
        specials: SpecialTokens,
        separation: Separation,
        batch_sequences: int,
    ) -> None:
        self.model, self.specials, self.separation = model, specials, separation
        self.batch_sequences = batch_sequences

    def batches(
        self,
        tokens_SL: UInt[np.ndarray, "S L"],
        starts_SL: Bool[np.ndarray, "S L"] | None = None,
        rows: int | None = None,
    ) -> Iterator[Batch]:
        """The forward passes over a part (as in PartInput), which shares none with another part."""
        if starts_SL is not None:
            yield from self._piece_batches(tokens_SL, piece_places(starts_SL, rows))
            return
        first = 0
        for batch_BL in np.split(
            tokens_SL, range(self.batch_sequences, len(tokens_SL), self.batch_sequences)
        ):
            inputs = model_inputs(batch_BL, self.specials, self.separation, self.model)
            yield Batch(inputs, np.arange(first, first + batch_BL.size))
            first += batch_BL.size

    def _piece_batches(
        self, tokens_SL: UInt[np.ndarray, "S L"], places: Sequence[Int64[np.ndarray, " _"]]
    ) -> Iterator[Batch]:
        most_tokens, flat = self.batch_sequences * tokens_SL.shape[1], tokens_SL.reshape(-1)
        is_padding_allowed = self.separation != "alone unpadded"
        lengths = [len(place) for place in places]
        for batch in piece_batches(lengths, most_tokens, is_padding_allowed):
            tokens = [places[piece] for piece in batch]
            inputs, kept = piece_inputs(
                [flat[place] for place in tokens], self.separation, self.model
            )
            is_padded = len(kept) < inputs["input_ids"].numel()
            on_device = torch.from_numpy(kept).to(self.model.device) if is_padded else None
            yield Batch(inputs, np.concatenate(tokens), on_device)


def piece_places(
    starts_SL: Bool[np.ndarray, "S L"], rows: int | None = None
) -> list[Int64[np.ndarray, " _"]]:
    """For each piece its tokens, counted along the part's sequences."""
    rows = starts_SL.size if rows is None else rows
    return np.split(np.arange(rows), np.flatnonzero(starts_SL.reshape(-1)[1:rows]) + 1)


def piece_batches(
    lengths: Sequence[int], most_tokens: int, is_padding_allowed: bool = True
) -> Iterator[Int64[np.ndarray, " B"]]:
    """Pieces of like length together, longest first; padding included, a batch has most_tokens."""
    sizes = np.array(lengths)
    order = np.argsort(-sizes, kind="stable")
    while len(order):
        longest = int(sizes[order[0]])
        count = max(1, most_tokens // longest)
        if not is_padding_allowed:
            count = min(count, int(np.count_nonzero(sizes[order] == longest)))
        yield order[:count]
        order = order[count:]


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
