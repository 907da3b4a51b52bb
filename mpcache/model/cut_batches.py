"""The forward passes over the tokens of a part: their arguments, and where their rows belong.

S: sequences in a part. L: tokens in a sequence. R: rows of a batch. B: sequences in a batch.
A piece is a run of at most `ctx_len` tokens of one document.
"""

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
    """The tokens of a part, and how the model sees them."""

    tokens_SL: UInt[np.ndarray, "S L"]
    starts_SL: Bool[np.ndarray, "S L"] | None = None
    "where pieces start, if the model sees each piece alone; None: it sees whole sequences"
    rows: int | None = None
    "tokens before the zeros that fill the last sequence; None: all"


def part_input(store: Store, part: int) -> PartInput:
    """The tokens of a committed part."""
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
    "the token of each kept row, counted along the part's sequences"
    kept: Int64[Tensor, " R"] | None = None
    "indices of the kept rows in the flat batch, on the model's device; None: all rows"


class ForwardBatches:
    """Cuts the tokens of a part into forward passes: whole sequences, or each piece alone."""

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
        """The forward passes over one part (fields of PartInput). No pass spans two parts."""
        if starts_SL is not None:
            yield from self._piece_batches(tokens_SL, piece_tokens(starts_SL, rows))
            return
        first = 0
        for batch_BL in np.split(
            tokens_SL, range(self.batch_sequences, len(tokens_SL), self.batch_sequences)
        ):
            inputs = model_inputs(batch_BL, self.specials, self.separation, self.model)
            yield Batch(inputs, np.arange(first, first + batch_BL.size))
            first += batch_BL.size

    def _piece_batches(
        self, tokens_SL: UInt[np.ndarray, "S L"], pieces: Sequence[Int64[np.ndarray, " _"]]
    ) -> Iterator[Batch]:
        max_tokens, flat = self.batch_sequences * tokens_SL.shape[1], tokens_SL.reshape(-1)
        is_padding_allowed = self.separation != "alone unpadded"
        lengths = [len(piece) for piece in pieces]
        for batch in piece_batches(lengths, max_tokens, is_padding_allowed):
            tokens = [pieces[i] for i in batch]
            inputs, kept = piece_inputs(
                [flat[piece] for piece in tokens], self.separation, self.model
            )
            is_padded = len(kept) < inputs["input_ids"].numel()
            on_device = torch.from_numpy(kept).to(self.model.device) if is_padded else None
            yield Batch(inputs, np.concatenate(tokens), on_device)


def piece_tokens(
    starts_SL: Bool[np.ndarray, "S L"], rows: int | None = None
) -> list[Int64[np.ndarray, " _"]]:
    """The tokens of each piece, counted along the part's sequences."""
    rows = starts_SL.size if rows is None else rows
    return np.split(np.arange(rows), np.flatnonzero(starts_SL.reshape(-1)[1:rows]) + 1)


def piece_batches(
    lengths: Sequence[int], max_tokens: int, is_padding_allowed: bool = True
) -> Iterator[Int64[np.ndarray, " B"]]:
    """Batches of pieces of similar length, longest first, of `max_tokens` with padding."""
    sizes = np.array(lengths)
    order = np.argsort(-sizes, kind="stable")
    while len(order):
        longest = int(sizes[order[0]])
        count = max(1, max_tokens // longest)
        if not is_padding_allowed:
            count = min(count, int(np.count_nonzero(sizes[order] == longest)))
        yield order[:count]
        order = order[count:]
