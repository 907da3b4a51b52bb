"""DATASET -> documents, in one seeded order.

A document is a text, a run of token ids, or a conversation. Its place is its rank in the permuted
order: the same config gives the same document at the same place, on any machine, with any numpy.
The digest is of the bytes that the documents were read from: no cache lies between the two.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int64

from mpcache.config import CollectConfig
from mpcache.data.dataset_files import find_shards
from mpcache.data.document_codec import Document, Kind, document_of, kind_of, record_of
from mpcache.data.local_dataset import read_files
from mpcache.data.local_documents import Row, refuse_without_tokenizer
from mpcache.data.text_column import mask_beside, mask_of, path_in, value_at
from mpcache.data.token_file import Indices, Vocabulary
from mpcache.errors import UsageError
from mpcache.hub import load_hub, resolve_commit

Fetch = Callable[[Indices], Sequence[Document]]

FETCH_DOCUMENTS = 64  # documents read at once; enough to hide the cost of a random arrow read
SHUFFLE_BUFFER = 10_000  # documents; of a streamed dataset, part of what defines its order


@dataclass(frozen=True)
class Documents:
    """A dataset in its permuted order. `digest` names its content, not its folder or order."""

    digest: str
    provenance: dict[str, str | None]
    order: Callable[[int], Iterator[Document]]
    "documents from a place on"
    kind: Kind = "text"
    largest_id: int | None = None
    "the largest token id that the model has an embedding for, where that is known"

    def read(self, start: int = 0) -> Iterator[tuple[int, Document]]:
        """Documents with their places, from place `start` on; free to start unless streamed."""
        return enumerate(self.order(start), start)


def open_documents(config: CollectConfig, vocabulary: Vocabulary) -> Documents:
    """The documents that `config` names, all of local files checked.

    Raises UsageError where the user can help it, ConnectionError where the Hub could not be asked.
    """
    if (shards := find_shards(config)) is None:
        return open_hub(config, vocabulary)
    files = read_files(shards, config, vocabulary)
    if not files.count:
        raise UsageError(f"dataset must hold a document, got none in {shards.label}")
    provenance = {"dataset": shards.label, "dataset_revision": None, "dataset_config": None}
    order = partial(permuted, files.fetch, files.count, config.seed)
    provenance["split"] = config.split
    return Documents(files.digest, provenance, order, files.kind, vocabulary.largest_id)


def permutation(count: int, key: str) -> Int64[np.ndarray, " count"]:
    """A permutation of range(count) drawn by `key`.

    Ranks hashed indices (splitmix64): numpy promises no stable stream for its own, and a store that
    is extended after an upgrade would train on documents it had held out.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    mixed = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable").astype(np.int64, copy=False)


# --- Hub ---


def open_hub(config: CollectConfig, vocabulary: Vocabulary) -> Documents:
    commit = resolve_commit(config)
    table = load_hub(config, commit)
    identity = (config.dataset, commit, config.dataset_config, config.split, config.text_column)
    rows = HubRows(table, config, vocabulary)
    return Documents(
        hashlib.sha256(json.dumps([*identity, config.streaming]).encode()).hexdigest(),
        {
            "dataset": config.dataset,
            "dataset_revision": commit,
            "dataset_config": config.dataset_config,
            "split": config.split,
        },
        rows.order,
        rows.kind,
        vocabulary.largest_id,
    )


class HubRows:
    """The documents of a Hub dataset or of a stream of one. A row is checked when it is read."""

    def __init__(
        self,
        table: Any,
        config: CollectConfig,
        vocabulary: Vocabulary,
    ) -> None:
        self.config, self.vocabulary = config, vocabulary
        names: list[str] = table.column_names or []  # a stream may not know them
        if names:
            table = self._chosen(table, names)
        first = list(islice(table, FETCH_DOCUMENTS))
        if not first:
            raise UsageError(f"dataset must hold a document, got {config.dataset} with none")
        tree = {**dict.fromkeys(names, ""), **first[0]}
        self.path = path_in(tree, config, config.dataset)
        self.kind: Kind = self._kind(first)
        refuse_without_tokenizer(self.kind, vocabulary, config)
        columns = [self.path[0], *(c for c in mask_beside(self.path)[:1] if c in first[0])]
        self.table = table.select_columns(list(dict.fromkeys(columns)))
        if isinstance(table, Sized):
            self.order: Callable[[int], Iterator[Document]] = partial(
                permuted, self.fetch, len(table), config.seed
            )
        else:  # a stream
            self.order = partial(streamed, self.table, config.seed, self.document)

    def _chosen(self, table: Any, names: list[str]) -> Any:
        """The table without columns that are not needed, which may hold what cannot be decoded."""
        wanted = self.config.text_column
        top = wanted if wanted in names else wanted.split(".")[0]
        if top not in names:
            path_in(dict.fromkeys(names, ""), self.config, self.config.dataset)  # says so
        columns = [top, *(mask_beside((top,)) if top == wanted else ())]
        return table.select_columns([name for name in dict.fromkeys(columns) if name in names])

    def _kind(self, first: list[dict[str, Any]]) -> Kind:
        """Of the first row that is not empty, among the first few."""
        for row in first:
            try:
                kind = kind_of(value_at(row, self.path))
            except (TypeError, KeyError) as error:
                raise UsageError(
                    f"text_column must hold text, token ids or chat messages, got {error} in "
                    f"{self.config.text_column} of {self.config.dataset}; name another"
                ) from error
            if kind:
                return kind
        return "text" if self.vocabulary.has_tokenizer else "tokens"

    def fetch(self, indices: Indices) -> list[Document]:
        columns = self.table[indices]
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return [self.document(row, int(i)) for row, i in zip(rows, indices, strict=True)]

    def document(self, row: dict[str, Any], place: int) -> Document:
        where = Row(self.config.dataset, place, "row")
        try:
            value = value_at(row, self.path)
        except KeyError as error:
            raise UsageError(f"{where} has no {error.args[0]}; use another text_column") from error
        mask = mask_of(row, self.path)
        record = record_of(value, mask, self.kind, self.vocabulary, where)
        return document_of(record, self.kind, where)


# --- orders ---


def permuted(fetch: Fetch, count: int, seed: int, start: int) -> Iterator[Document]:
    order = permutation(count, f"documents {seed}")
    for place in range(start, count, FETCH_DOCUMENTS):
        yield from fetch(order[place : place + FETCH_DOCUMENTS])


def streamed(
    table: Any,
    seed: int,
    document: Callable[[dict[str, Any], int], Document],
    start: int,
) -> Iterator[Document]:
    """Shards in a seeded order through a seeded buffer: less mixed than a permutation, and to start
    at a place is to read what comes before it."""
    shuffled = table.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    for place, row in enumerate(islice(shuffled, start, None), start):
        yield document(row, place)
