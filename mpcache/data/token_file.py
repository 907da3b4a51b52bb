"""Token ids without text: which of them a model can read, and the documents of a `.bin`.

A `.bin` is a flat little-endian stream; each document in it is closed by the end token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt
from transformers import PreTrainedTokenizerBase

from mpcache.data.data_file import DataFile, is_web_page, temporary_file
from mpcache.data.temporary_record_file import read_exactly
from mpcache.errors import UsageError

Tokens = UInt[np.ndarray, " _"]
Indices = Int64[np.ndarray, " _"]

SCAN_TOKENS = 1 << 24  # tokens of a .bin looked at at once, so that a file larger than memory opens


@dataclass(frozen=True)
class TokenIds:
    """What a model's config says of its tokens, in place of a tokenizer that is not there."""

    vocab_size: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None

    @property
    def all_special_ids(self) -> list[int]:
        ids = (self.bos_token_id, self.eos_token_id, self.cls_token_id, self.sep_token_id)
        return [i for i in ids if i is not None]


Tokenizer = PreTrainedTokenizerBase | TokenIds


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of a model, as far as a dataset has to know them."""

    end: int | None
    "ends a document in a `.bin`"
    dtype: np.dtype[Any]
    "smallest unsigned integer for the ids of the tokenizer"
    largest_id: int
    "the largest id that a dataset of token ids may hold"
    has_tokenizer: bool = True
    "texts and chats can be read"


def vocabulary_of(tokenizer: Tokenizer, embeddings: int | None = None) -> Vocabulary:
    """`embeddings`: rows of the model's embedding; None where only the tokenizer is known."""
    dtype = token_dtype(tokenizer)
    largest = largest_id(tokenizer) if embeddings is None else embeddings - 1
    # tokens are stored in this dtype
    largest = min(largest, int(np.iinfo(dtype).max))
    has_tokenizer = not isinstance(tokenizer, TokenIds)
    return Vocabulary(end_token(tokenizer), dtype, largest, has_tokenizer)


def end_token(tokenizer: Tokenizer) -> int | None:
    """The token that ends a document: EOS, else SEP."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token, int):
            return token
    return None


def largest_id(tokenizer: Tokenizer) -> int:
    """The largest token id; ids may leave gaps, so it is no count."""
    if isinstance(tokenizer, TokenIds):
        return tokenizer.vocab_size - 1
    return max(tokenizer.get_vocab().values())


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Smallest unsigned integer that holds every token id."""
    return np.dtype(np.min_scalar_type(largest_id(tokenizer)))


# --- .bin ---


class TokenFile:
    """The documents of a `.bin`: uint16, or uint32 where ids need it; ends stripped."""

    def __init__(self, file: DataFile, vocabulary: Vocabulary) -> None:
        self.file, self.vocabulary = file, vocabulary
        self.dtype = np.promote_types(vocabulary.dtype, np.uint16).newbyteorder("<")
        if is_web_page(file):
            raise UsageError(f"{file.name} is a web page, not token ids; download it again")
        if vocabulary.end is None:
            raise UsageError(
                f"documents in {file.name} must end with the model's end token, but the model "
                "names none; give token ids in a column of a table instead"
            )
        self.copy = temporary_file() if file.compression else None
        with file.explained("compressed tokens"):
            self.bounds = self._bounds(self._scanned())
        file.check_unchanged()
        if self.copy is not None:
            file.close()

    def __del__(self) -> None:
        if (copy := getattr(self, "copy", None)) is not None:
            copy.close()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Tokens:
        if self.copy is None:
            self.file.check_unchanged(thorough=False)
        start, stop = int(self.bounds[index]), int(self.bounds[index + 1]) - 1
        descriptor = self.file.descriptor if self.copy is None else self.copy.fileno()
        width = self.dtype.itemsize
        tokens = np.frombuffer(
            read_exactly(descriptor, (stop - start) * width, start * width), self.dtype
        )
        return tokens.astype(self.dtype.newbyteorder("="), copy=False)

    def _scanned(self) -> list[tuple[int, Indices]]:
        """Where end tokens are: a piece's start and the places in it. Checks all ids."""
        ends, start, size = [], 0, self.dtype.itemsize
        with self.file.stream() as stream:
            while data := stream.read(SCAN_TOKENS * size):
                if self.copy is not None:
                    self.copy.write(data)
                if len(data) % size:
                    raise UsageError(self._odd(start * size + len(data)))
                piece = np.frombuffer(data, self.dtype)
                self._check(piece, start)
                ends.append((start, np.flatnonzero(piece == self.vocabulary.end)))
                start += len(piece)
        if not start:
            raise UsageError(self._odd(0))
        if self.copy is not None:
            self.copy.flush()
        self.size = start
        return ends

    def _bounds(self, ends: list[tuple[int, Indices]]) -> Int64[np.ndarray, " bounds"]:
        """Where documents start, and one past the last one's end token."""
        starts = [np.zeros(1, np.int64), *(start + places + 1 for start, places in ends)]
        bounds = np.concatenate(starts)
        if len(bounds) == 1:
            raise UsageError(
                f"documents in {self.file.name} must end with token {self.vocabulary.end}, "
                "got no such token; write the file with it"
            )
        # the file may stop amid a document: as if its end token came next
        is_whole = bounds[-1] == self.size
        return bounds if is_whole else np.append(bounds, self.size + 1)

    def _odd(self, size: int) -> str:
        return (
            f"a tokenised .bin must hold {self.dtype.name} tokens, got {size} bytes in "
            f"{self.file.name}; it may be cut short: write it again"
        )

    def _check(self, piece: Tokens, start: int) -> None:
        if piece.max() > self.vocabulary.largest_id:
            index = int(np.argmax(piece > self.vocabulary.largest_id))
            raise UsageError(
                f"tokens must be at most {self.vocabulary.largest_id} for this model, got "
                f"{piece[index]} at token {start + index} of {self.file.name}; "
                "tokenise it with the model's own tokenizer"
            )
