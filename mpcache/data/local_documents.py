"""The documents of all files of a dataset, in order, while they are read and after."""

import bisect
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from mpcache.config import CollectConfig
from mpcache.data.document_codec import (
    Document,
    Kind,
    Where,
    document_of,
    kind_of,
    kind_of_type,
    record_of,
    text_records,
    token_records,
)
from mpcache.data.temporary_record_file import TemporaryRecords
from mpcache.data.text_column import NO_MASK
from mpcache.data.token_file import Indices, Vocabulary
from mpcache.errors import UsageError


class DocumentList:
    """Documents of one kind, which the first row that is not empty decides."""

    def __init__(self, config: CollectConfig, vocabulary: Vocabulary) -> None:
        self.config, self.vocabulary = config, vocabulary
        self.spool = TemporaryRecords()
        self.kind: Kind | None = None
        self.files: list[tuple[int, str]] = []
        "of each file the first document, and the file's name"

    def __len__(self) -> int:
        return len(self.spool)

    def begin(self, name: str) -> None:
        """The documents of another file follow."""
        self.files.append((len(self), name))

    def add(self, value: Any, mask: Any, where: object) -> None:
        """Add the document of a row. Raises UsageError, which names `where` the row is."""
        try:
            kind = self._settled(kind_of(value), where)
        except TypeError as error:
            raise self._unusable(error, where) from error
        record = record_of(value, mask, kind, self.vocabulary, where) if kind else b""
        self.spool.add(record)

    def add_text(self, text: str, where: object) -> None:
        """Add a document that is known to be a text."""
        self.add(text, NO_MASK, where)

    def check_type(self, kind: pa.DataType, where: object) -> None:
        """Raise UsageError for an arrow column that can hold no documents, or of another kind."""
        try:
            self._settled(kind_of_type(kind), where)
        except TypeError as error:
            raise self._unusable(error, where) from error

    def add_array(self, array: pa.Array, mask: pa.Array | None, where: Where) -> None:
        """Add the documents of an arrow column whose type was checked."""
        array.validate(full=True)  # of UTF-8 too; a damaged file's bounds may lead anywhere
        kind = kind_of_type(array.type)
        if kind == "text":
            self.spool.add_all(*text_records(array))
        elif kind == "tokens":
            self.spool.add_all(*token_records(array, mask, self.vocabulary, where))
        else:
            for index, value in enumerate(array.to_pylist()):
                self.add(value, NO_MASK, where(index))

    def _settled(self, kind: Kind | None, where: object) -> Kind | None:
        if kind is not None and self.kind is None:
            self.kind = kind
            refuse_without_tokenizer(kind, self.vocabulary, self.config)
        if kind is not None and kind != self.kind and not isinstance(where, Row):
            raise UsageError(
                f"all files must hold the same kind of documents, got {kind} in {where} "
                f"after {self.kind}; name files of one kind"
            )
        return self.kind

    def _unusable(self, error: TypeError, where: object) -> UsageError:
        return UsageError(
            f"{where}: text_column must hold text, token ids or chat messages, got {error} in "
            f"{self.config.text_column}; name another"
        )

    def fetch(self, indices: Indices) -> Sequence[Document]:
        """Documents by their indices; `spool` is finished."""
        return [
            document_of(self.spool[int(index)], self.kind, self._row(int(index)))
            for index in indices
        ]

    def _row(self, index: int) -> "Row":
        first, name = self.files[bisect.bisect(self.files, index, key=lambda file: file[0]) - 1]
        return Row(name, index - first, "row")


def refuse_without_tokenizer(kind: Kind, vocabulary: Vocabulary, config: CollectConfig) -> None:
    """Texts and chats need a tokenizer."""
    if kind != "tokens" and not vocabulary.has_tokenizer:
        raise UsageError(
            f"{config.dataset} holds {kind}, and the model {config.model} has no tokenizer; "
            "put its tokenizer.json beside the model, or name a column of token ids with "
            "--text-column"
        )


class Row:
    """A row of a file, in words, which are made where they are needed only."""

    def __init__(self, name: str, number: int, unit: str = "line") -> None:
        self.name, self.number, self.unit = name, number, unit

    def __str__(self) -> str:
        first = " (the first is 0)" if self.unit == "row" else ""
        return f"{self.unit} {self.number} of {self.name}{first}"


def rows_from(name: str, first: int) -> Where:
    """Names the rows of an array; `first` is the number of the array's first row in the file."""
    return lambda index: Row(name, first + int(index), "row")
