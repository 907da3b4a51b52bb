"""The held-out tokens of a store, as a language model with a head must predict them.

B: sequences in a forward pass. L: tokens in a sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from mpcache.data.document_boundaries import document_starts
from mpcache.errors import UsageError
from mpcache.model.bert_masking import BertMasking
from mpcache.model.cut_batches import ForwardBatches, part_input, piece_tokens
from mpcache.model.inputs import PACKED_SEPARATIONS, ModelInputs, piece_inputs
from mpcache.store.object_paths import BY_ASSISTANT
from mpcache.store.reader import Store


@dataclass(frozen=True)
class Example:
    """Tokens of a store, and what the model must predict."""

    inputs: ModelInputs
    "the arguments of the forward pass"
    tokens_BL: Int64[Tensor, "B L"]
    "the stored tokens, including those that are hidden from the model"
    wanted_BL: Int64[Tensor, "B L"]
    "the token that the logits at a position must predict"
    counts_BL: Bool[Tensor, "B L"]
    "whether the logits at a position count"
    by_assistant_BL: Bool[Tensor, "B L"] | None
    "whether the assistant of a conversation wrote the token; None: the store does not know"


class ValidationExamples:
    """Iterates over the committed validation tokens of a store."""

    def __init__(self, store: Store, batches: ForwardBatches, masking: BertMasking | None) -> None:
        """`masking` hides tokens from a bidirectional model; None: predict the next token."""
        self.store, self.batches, self.masking = store, batches, masking
        self.device = batches.model.device

    def __iter__(self) -> Iterator[Example]:
        for part in self._parts():
            flags_SL = self.store.tokens.read_flags(part) if self.store.has_assistant else None
            for inputs, tokens_L in self._inputs(part):
                by_assistant_BL = None
                if flags_SL is not None:
                    written_L = (flags_SL.reshape(-1)[tokens_L] & BY_ASSISTANT) > 0
                    by_assistant_BL = torch.from_numpy(written_L)[None].to(self.device)
                yield self._example(inputs, by_assistant_BL)

    def longest_inputs(self) -> ModelInputs:
        """The longest sequence of the first validation part.

        Raises UsageError for a store without a held-out sequence of at least two tokens.
        """
        inputs = (inputs for part in self._parts()[:1] for inputs, _ in self._inputs(part))
        longest = max(inputs, key=lambda inputs: inputs["input_ids"].numel(), default=None)
        if longest is None and not self._parts():
            raise UsageError(
                f"{self.store.storage} has no validation tokens yet; collect more rows with "
                "mpcache collect"
            )
        if longest is None or longest["input_ids"].numel() < 2:
            raise UsageError(
                f"{self.store.storage} must have a validation sequence of at least two tokens, "
                "got only shorter ones; collect longer documents, or use a larger --ctx-len"
            )
        return longest

    def _example(self, inputs: ModelInputs, by_assistant_BL: Bool[Tensor, "B L"] | None) -> Example:
        ids_BL = inputs["input_ids"]
        if self.masking is None:
            counts_BL = ~self._ends_document(ids_BL)
            return Example(inputs, ids_BL, ids_BL.roll(-1, dims=1), counts_BL, by_assistant_BL)
        hidden = [self.masking.hide(ids_L.cpu().numpy()) for ids_L in ids_BL]
        shown_BL, counts_BL = (
            torch.from_numpy(np.stack(arrays)).to(ids_BL.device)
            for arrays in zip(*hidden, strict=True)
        )
        shown = {**inputs, "input_ids": shown_BL}
        return Example(shown, ids_BL, ids_BL, counts_BL, by_assistant_BL)

    def _ends_document(self, ids_BL: Int64[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """Whether a token is the last of its sequence, or of its document if these are separated.

        The model cannot predict the token that follows.
        """
        ends_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        ends_BL[:, -1] = True
        if self.batches.separation in PACKED_SEPARATIONS:
            tokens_BL = ids_BL.cpu().numpy().astype(np.uint32)
            starts_BL = torch.from_numpy(document_starts(tokens_BL, self.batches.specials))
            ends_BL[:, :-1] |= starts_BL[:, 1:].to(ids_BL.device)
        return ends_BL

    def _parts(self) -> list[int]:
        """The parts of the validation split."""
        numbers = self.store.part_numbers("tokens")
        return [part for part in numbers if self.store.layout.split_of(part) == "validation"]

    def _inputs(self, part: int) -> Iterator[tuple[ModelInputs, Int64[np.ndarray, " L"]]]:
        """Arguments of a pass over each sequence, with the indices of its tokens in the part."""
        tokens = part_input(self.store, part)
        if tokens.starts_SL is None:
            yield from ((batch.inputs, batch.tokens) for batch in self.batches.batches(*tokens))
            return
        for tokens_L in piece_tokens(tokens.starts_SL, tokens.rows):
            if len(tokens_L) > 1:  # a single token predicts nothing
                piece = tokens.tokens_SL.reshape(-1)[tokens_L]
                inputs, _ = piece_inputs([piece], self.batches.separation, self.batches.model)
                yield inputs, tokens_L
