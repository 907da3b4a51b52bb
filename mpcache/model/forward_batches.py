"""The forward passes over the tokens of a part: their arguments, and where their rows belong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt
from torch import Tensor
from transformers import PreTrainedModel

from mpcache.data.special_tokens import SpecialTokens
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


class ForwardBatches:
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
