"""Read the tokens of a store, and which token each row is.

Shapes: S sequences of a part, L tokens of a sequence (`ctx_len`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from mpcache.store.object_paths import (
    BY_ASSISTANT,
    POSITION,
    SEQUENCE,
    STARTS_DOCUMENT,
    TOKEN_FLAGS,
    TOKENS,
    array_specs,
    committed_length,
)
from mpcache.store.part_reader import PartReader
from mpcache.store.store_metadata import StoreMetadata


class TokenReader:
    """Tokens, their flags, and the token of each row. Threads may share it.

    `chunk` counts the chunks of a part; None stands for the whole part. Every read raises
    DamagedStoreError where the bytes are not those that were committed.
    """

    def __init__(self, metadata: StoreMetadata, reader: PartReader) -> None:
        self.metadata = metadata
        self.layout = metadata.layout
        self.reader = reader

    def read_tokens(self, part: int) -> np.ndarray:
        """Token ids `[S, L]` of a part; zeros fill up the last sequence."""
        return self._read_beside_tokens(TOKENS, part)

    def read_flags(self, part: int) -> UInt8[np.ndarray, "S L"] | None:
        """Flags of the tokens of a part, as bits; None: the store has none."""
        return self._read_beside_tokens(TOKEN_FLAGS, part) if self.layout.token_flags else None

    def read_document_starts(self, part: int) -> Bool[np.ndarray, "S L"] | None:
        """Where the pieces of documents start that the model saw alone.

        None: the model saw whole sequences.
        """
        if not self.metadata.has_lone_documents:
            return None
        flags_SL = self.read_flags(part)
        assert flags_SL is not None
        return (flags_SL & STARTS_DOCUMENT) > 0

    def read_positions(self, part: int, chunk: int | None = None) -> Int64[Tensor, " rows"]:
        """Position of each row in what the model saw together.

        That is the row's sequence, or its piece of a document where the model saw each alone.
        """
        position = self.reader.read_rows(POSITION, part, chunk).astype(np.int64)
        if (starts_SL := self.read_document_starts(part)) is not None:
            sequence = self.read_sequences(part, chunk).numpy()
            position = _piece_positions(starts_SL)[self._token(sequence, position, part)]
        return torch.from_numpy(position)

    def read_sequences(self, part: int, chunk: int | None = None) -> Int64[Tensor, " rows"]:
        """Sequence of each row, counted over the whole store."""
        return torch.from_numpy(self.reader.read_rows(SEQUENCE, part, chunk).astype(np.int64))

    def read_token_ids(self, part: int, chunk: int | None = None) -> Int64[Tensor, " rows"]:
        """Token id of each row."""
        token = self._token_of_row(part, chunk)
        return torch.from_numpy(self.read_tokens(part).reshape(-1)[token].astype(np.int64))

    def read_assistant(self, part: int, chunk: int | None = None) -> Bool[Tensor, " rows"] | None:
        """Whether the assistant wrote the token of each row; None: the store does not say."""
        if not self.metadata.has_assistant:
            return None
        flags_SL = self.read_flags(part)
        assert flags_SL is not None
        is_written = (flags_SL.reshape(-1)[self._token_of_row(part, chunk)] & BY_ASSISTANT) > 0
        return torch.from_numpy(is_written)

    def token_count(self, part: int) -> int:
        """Tokens of a part without padding, which are its rows."""
        return self.reader.index.mark(part, TOKENS).rows

    def empty_documents(self, parts: Sequence[int] | None = None) -> int | None:
        """Documents without tokens that some parts, or all, left out; None: they are kept."""
        if "empty_documents" not in self.metadata.identity:
            return None
        index = self.reader.index
        numbers = index.part_numbers(TOKENS) if parts is None else parts
        progress = index.map_parts(index.token_progress, numbers)
        return sum(part.empty_documents or 0 for part in progress)

    def _read_beside_tokens(self, name: str, part: int) -> np.ndarray:
        (spec,) = (spec for spec in array_specs(TOKENS, self.layout) if spec.name == name)
        sequences = committed_length(spec, TOKENS, self.token_count(part), self.layout.ctx_len)
        return self.reader.read_object(TOKENS, spec, part, 0, sequences)

    def _token_of_row(self, part: int, chunk: int | None) -> np.ndarray:
        """The token of each row, counted along the part's sequences."""
        sequence = self.reader.read_rows(SEQUENCE, part, chunk).astype(np.int64)
        return self._token(sequence, self.reader.read_rows(POSITION, part, chunk), part)

    def _token(self, sequence: np.ndarray, position: np.ndarray, part: int) -> np.ndarray:
        first = part * self.layout.part_sequences
        token: np.ndarray = (sequence - first) * self.layout.ctx_len + position
        return token


def _piece_positions(starts_SL: Bool[np.ndarray, "S L"]) -> Int64[np.ndarray, " tokens"]:
    """Position of each token of a part in its piece."""
    token = np.arange(starts_SL.size)
    return token - np.maximum.accumulate(np.where(starts_SL.reshape(-1), token, 0))
