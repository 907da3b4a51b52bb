"""The documents of local files in order: added file by file, then read at random."""

import bisect
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from mpcache.config import CollectConfig
from mpcache.data.document_codec import (
    Document,
    Kind,
    Where,
    decode_document,
    encode_record,
    kind_of_type,
    kind_of_value,
    text_records,
    token_records,
)
from mpcache.data.temporary_record_file import TemporaryRecordFile
from mpcache.data.text_column import NO_MASK
from mpcache.data.vocabulary import Indices, Vocabulary
from mpcache.errors import UsageError


class LocalDocuments:
    """Documents of one kind. The first row that is not empty decides the kind."""

    def __init__(self, config: CollectConfig, vocabulary: Vocabulary) -> None:
        self.config, self.vocabulary = config, vocabulary
        self.records = TemporaryRecordFile()
        self.kind: Kind | None = None
        self._files: list[tuple[int, str]] = []
        "index of the first document of each file, and the file's name"

    def __len__(self) -> int:
        return len(self.records)

    def begin_file(self, name: str) -> None:
        """Assign the documents that are added next to this file."""
        self._files.append((len(self), name))

    def add(self, value: Any, mask: Any, where: object) -> None:
        """Add the document of a row. Raises UsageError, which names the row by `where`."""
        try:
            kind = self._common_kind(kind_of_value(value), where)
        except TypeError as error:
            raise self._unusable_column(error, where) from error
        record = encode_record(value, mask, kind, self.vocabulary, where) if kind else b""
        self.records.add(record)

    def add_text(self, text: str, where: object) -> None:
        """Add a text."""
        self.add(text, NO_MASK, where)

    def check_type(self, kind: pa.DataType, where: object) -> None:
        """Raise UsageError for an arrow column of another kind, or that cannot hold documents."""
        try:
            self._common_kind(kind_of_type(kind), where)
        except TypeError as error:
            raise self._unusable_column(error, where) from error

    def add_array(self, array: pa.Array, mask: pa.Array | None, where: Where) -> None:
        """Add the documents of an arrow column. `check_type` has passed its type."""
        array.validate(full=True)  # UTF-8 and offsets, which may be wrong in a damaged file
        kind = kind_of_type(array.type)
        if kind == "text":
            self.records.add_all(*text_records(array))
        elif kind == "tokens":
            self.records.add_all(*token_records(array, mask, self.vocabulary, where))
        else:
            for index, value in enumerate(array.to_pylist()):
                self.add(value, NO_MASK, where(index))

    def _common_kind(self, kind: Kind | None, where: object) -> Kind | None:
        if kind is not None and self.kind is None:
            self.kind = kind
            check_has_tokenizer(kind, self.vocabulary, self.config)
        if kind is not None and kind != self.kind and not isinstance(where, Row):
            raise UsageError(
                f"all files must hold the same kind of documents, got {kind} in {where}, but "
                f"{self.kind} in the files before it; select files of one kind in --dataset"
            )
        return self.kind

    def _unusable_column(self, error: TypeError, where: object) -> UsageError:
        return UsageError(
            f"{where}: text_column must hold text, token ids or chat messages, got {error} in "
            f"{self.config.text_column}; give another column with "
            "--text-column"
        )

    def finish(self) -> None:
        """End the additions. Documents can be read from now on."""
        self.records.finish()

    def fetch(self, indices: Indices) -> Sequence[Document]:
        """Documents by their indices."""
        return [
            decode_document(self.records[int(index)], self.kind, self._row(int(index)))
            for index in indices
        ]

    def _row(self, index: int) -> "Row":
        first, name = self._files[bisect.bisect(self._files, index, key=lambda file: file[0]) - 1]
        return Row(name, index - first, "row")


def check_has_tokenizer(kind: Kind, vocabulary: Vocabulary, config: CollectConfig) -> None:
    """Raise UsageError for texts or chats and a model without a tokenizer."""
    if kind != "tokens" and not vocabulary.has_tokenizer:
        raise UsageError(
            f"{config.dataset} holds {kind}, but the model {config.model} has no tokenizer; put "
            "its tokenizer.json into the model's folder, or give a column of token ids with "
            "--text-column"
        )


class Row:
    """The position of a row in a file. The text for messages is made only when it is needed."""

    def __init__(self, name: str, number: int, unit: str = "line") -> None:
        self.name, self.number, self.unit = name, number, unit

    def __str__(self) -> str:
        first = " (the first is 0)" if self.unit == "row" else ""
        return f"{self.unit} {self.number} of {self.name}{first}"


def row_positions(name: str, first: int) -> Where:
    """Positions of the rows of an array. `first` is the number of its first row in the file."""
    return lambda index: Row(name, first + int(index), "row")
