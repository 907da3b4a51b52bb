"""A dataset of the Hugging Face Hub -> its documents, at one commit."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sized
from functools import partial
from itertools import islice
from typing import Any

from huggingface_hub import HfApi

from mpcache.config import CollectConfig
from mpcache.data.document_codec import (
    Document,
    Kind,
    decode_document,
    encode_record,
    kind_of_value,
)
from mpcache.data.documents import FETCH_DOCUMENTS, Documents, permuted_documents
from mpcache.data.local_documents import Row, check_has_tokenizer
from mpcache.data.text_column import column_path, mask_of, mask_path, value_at
from mpcache.data.vocabulary import Indices, Vocabulary
from mpcache.errors import UsageError
from mpcache.hub_errors import explain_hub_errors

SHUFFLE_BUFFER = 10_000  # documents; part of what defines the order of a streamed dataset


def open_hub_dataset(config: CollectConfig, vocabulary: Vocabulary) -> Documents:
    """Raises UsageError for data that cannot be used, ConnectionError without the Hub."""
    commit = resolve_commit(config)
    dataset = HubDataset(load_hub_split(config, commit), config, vocabulary)
    identity = (config.dataset, commit, config.dataset_config, config.split, config.text_column)
    return Documents(
        hashlib.sha256(json.dumps([*identity, config.streaming]).encode()).hexdigest(),
        {
            "dataset": config.dataset,
            "dataset_revision": commit,
            "dataset_config": config.dataset_config,
            "split": config.split,
        },
        dataset.order,
        dataset.kind,
        vocabulary.largest_id,
    )


# --- loading ---


def resolve_commit(config: CollectConfig) -> str:
    """The commit that the revision means now. A full commit hash needs no connection."""
    if re.fullmatch(r"[0-9a-f]{40}", config.dataset_revision):
        return config.dataset_revision
    with explain_hub_errors(f"dataset {config.dataset}", config.dataset_revision):
        return str(HfApi().dataset_info(config.dataset, revision=config.dataset_revision).sha)


def load_hub_split(config: CollectConfig, commit: str) -> Any:
    """The split at a commit, as a Dataset or IterableDataset; never a cached other commit."""
    import datasets  # slow to import, and local files do without it

    with explain_hub_errors(f"dataset {config.dataset}", commit):
        builder = datasets.load_dataset_builder(
            config.dataset, config.dataset_config, revision=commit
        )
    check_commit(builder.hash, config, commit)
    with explain_hub_errors(f"dataset {config.dataset}", commit):
        if config.streaming:
            return builder.as_streaming_dataset(split=config.split)
        builder.download_and_prepare()
        return builder.as_dataset(split=config.split)


def check_commit(cached: str | None, config: CollectConfig, commit: str) -> None:
    """Raise ConnectionError where `datasets` took another commit from its cache.

    Without the Hub, `datasets` takes the latest commit of its cache, whatever commit was asked for.
    A builder has its commit as its hash.
    """
    if cached != commit:
        raise ConnectionError(
            f"the Hub cannot be reached for dataset {config.dataset} at {commit}; the local "
            f"cache has another version, {cached}: check the connection and HF_HUB_OFFLINE, or "
            f"give --dataset-revision {cached}"
        )


# --- documents ---


class HubDataset:
    """The documents of a Hub dataset, downloaded or streamed. Each row is checked when read."""

    def __init__(self, table: Any, config: CollectConfig, vocabulary: Vocabulary) -> None:
        self.config, self.vocabulary = config, vocabulary
        names: list[str] = table.column_names or []  # a stream may not know them
        if names:
            table = self._with_needed_columns(table, names)
        first_rows = list(islice(table, FETCH_DOCUMENTS))
        if not first_rows:
            raise UsageError(
                f"the dataset {config.dataset} has no documents; give another --dataset or --split"
            )
        tree = {**dict.fromkeys(names, ""), **first_rows[0]}
        self.path = column_path(tree, config, config.dataset)
        self.kind: Kind = self._kind_of_rows(first_rows)
        check_has_tokenizer(self.kind, vocabulary, config)
        masks = [name for name in mask_path(self.path)[:1] if name in first_rows[0]]
        self.table = table.select_columns(list(dict.fromkeys([self.path[0], *masks])))
        self.order: Callable[[int], Iterator[Document]] = self._streamed_documents
        if isinstance(table, Sized):
            self.order = partial(permuted_documents, self.fetch, len(table), config.seed)

    def fetch(self, indices: Indices) -> list[Document]:
        """Documents by their indices in the split."""
        columns = self.table[indices]
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        return [self.document(row, int(i)) for row, i in zip(rows, indices, strict=True)]

    def document(self, row: dict[str, Any], number: int) -> Document:
        """The document of a row. Raises UsageError, which names the row by its number."""
        where = Row(self.config.dataset, number, "row")
        try:
            value = value_at(row, self.path)
        except KeyError as error:
            raise UsageError(
                f"{where} has no column {error.args[0]}; give another column with --text-column"
            ) from error
        mask = mask_of(row, self.path)
        record = encode_record(value, mask, self.kind, self.vocabulary, where)
        return decode_document(record, self.kind, where)

    def _streamed_documents(self, start: int) -> Iterator[Document]:
        """Shards in a seeded order through a seeded buffer, so mixed less than by a permutation.

        Starting at a rank reads all documents before it.
        """
        shuffled = self.table.shuffle(seed=self.config.seed, buffer_size=SHUFFLE_BUFFER)
        for rank, row in enumerate(islice(shuffled, start, None), start):
            yield self.document(row, rank)

    def _with_needed_columns(self, table: Any, names: list[str]) -> Any:
        """The table without columns that are not needed: these may hold undecodable values."""
        wanted = self.config.text_column
        top = wanted if wanted in names else wanted.split(".")[0]
        if top not in names:
            column_path(dict.fromkeys(names, ""), self.config, self.config.dataset)  # raises
        columns = [top, *(mask_path((top,)) if top == wanted else ())]
        return table.select_columns([name for name in dict.fromkeys(columns) if name in names])

    def _kind_of_rows(self, rows: list[dict[str, Any]]) -> Kind:
        """The kind of the first row that is not empty."""
        for row in rows:
            try:
                kind = kind_of_value(value_at(row, self.path))
            except (TypeError, KeyError) as error:
                raise UsageError(
                    f"text_column must hold text, token ids or chat messages, got {error} in "
                    f"{self.config.text_column} of {self.config.dataset}; give another column "
                    "with --text-column"
                ) from error
            if kind:
                return kind
        return "text" if self.vocabulary.has_tokenizer else "tokens"
