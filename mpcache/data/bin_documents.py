"""Documents of a `.bin` file: a flat little-endian stream of token ids.

The end token closes each document.
"""

import numpy as np
from jaxtyping import Int64

from mpcache.data.digested_file import DataFile, is_web_page, temporary_file
from mpcache.data.temporary_record_file import read_exactly
from mpcache.data.vocabulary import Indices, Tokens, Vocabulary
from mpcache.errors import UsageError

SCAN_TOKENS = 1 << 24  # tokens read at once, so that a file may be larger than memory


# --- .bin ---


class TokenFile:
    """The documents of a `.bin`, without end tokens. Ids are uint16, or uint32 if they need it."""

    def __init__(self, file: DataFile, vocabulary: Vocabulary) -> None:
        self.file, self.vocabulary = file, vocabulary
        self.dtype = np.promote_types(vocabulary.dtype, np.uint16).newbyteorder("<")
        if is_web_page(file):
            raise UsageError(
                f"{file.name} is a web page, not token ids; download the file itself instead of "
                "the page"
            )
        if vocabulary.end is None:
            raise UsageError(
                f"documents in {file.name} must end with the model's end token, but the model "
                "has no end token; give the token ids in a table, with --text-column"
            )
        self.copy = temporary_file() if file.compression else None
        with file.explained("compressed tokens"):
            self.bounds = self._bounds(self._scan())
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

    def _scan(self) -> list[tuple[int, Indices]]:
        """Indices of end tokens, as the start of a piece and offsets in it. Checks all ids."""
        ends, start, size = [], 0, self.dtype.itemsize
        with self.file.stream() as stream:
            while data := stream.read(SCAN_TOKENS * size):
                if self.copy is not None:
                    self.copy.write(data)
                if len(data) % size:
                    raise UsageError(self._bad_size_message(start * size + len(data)))
                piece = np.frombuffer(data, self.dtype)
                self._check_ids(piece, start)
                ends.append((start, np.flatnonzero(piece == self.vocabulary.end)))
                start += len(piece)
        if not start:
            raise UsageError(self._bad_size_message(0))
        if self.copy is not None:
            self.copy.flush()
        self.size = start
        return ends

    def _bounds(self, ends: list[tuple[int, Indices]]) -> Int64[np.ndarray, " bounds"]:
        """Where documents start, and one past the last one's end token."""
        starts = [np.zeros(1, np.int64), *(start + offsets + 1 for start, offsets in ends)]
        bounds = np.concatenate(starts)
        if len(bounds) == 1:
            raise UsageError(
                f"documents in {self.file.name} must end with token {self.vocabulary.end}, got "
                "no such token; write this token after each document"
            )
        # without an end token the last document ends with the file
        is_whole = bounds[-1] == self.size
        return bounds if is_whole else np.append(bounds, self.size + 1)

    def _bad_size_message(self, size: int) -> str:
        return (
            f"a tokenised .bin must hold {self.dtype.name} tokens, got {size} bytes in "
            f"{self.file.name}; it may be cut short: write it again"
        )

    def _check_ids(self, piece: Tokens, start: int) -> None:
        if piece.max() > self.vocabulary.largest_id:
            index = int(np.argmax(piece > self.vocabulary.largest_id))
            raise UsageError(
                f"token ids must be at most {self.vocabulary.largest_id} for this model, got "
                f"{piece[index]} at token {start + index} of {self.file.name}; tokenize the data "
                "with the model's own tokenizer"
            )
