"""DATASET -> documents, in one seeded order.

A document is a text, or from a `.bin` a run of token ids. Its place is its rank in the permuted
order: the same config gives the same document at the same place, on any machine, with any numpy.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from jaxtyping import Int64
from transformers import PreTrainedTokenizerBase

from mpcache.config import CollectConfig
from mpcache.conversation import Conversation
from mpcache.hub import first_line, load_hub, names_a_place, resolve_commit
from mpcache.tokenised import Indices, Tokens, token_source

Document = str | Tokens | Conversation
Kind = Literal["text", "tokens", "conversations"]
Fetch = Callable[[Indices], Sequence[Document]]

FETCH_DOCUMENTS = 64  # documents read at once; enough to hide the cost of a random arrow read
SHUFFLE_BUFFER = 10_000  # documents; of a streamed dataset, part of what defines its order
FILE_KINDS = {".jsonl": "json", ".parquet": "parquet"}
LOCAL_SUFFIXES = (*FILE_KINDS, ".txt", ".bin")


@dataclass(frozen=True)
class Documents:
    """A dataset in its permuted order. `digest` names its content, not its folder or order."""

    digest: str
    provenance: dict[str, str | None]
    order: Callable[[int], Iterator[Document]]
    "documents from a place on"
    kind: Kind = "text"

    def read(self, start: int = 0) -> Iterator[tuple[int, Document]]:
        """Documents with their places, from place `start` on; free to start unless streamed."""
        return enumerate(self.order(start), start)


def open_documents(config: CollectConfig, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """The documents that `config` names; the tokenizer tells the documents of a `.bin` apart.

    Raises ValueError where the user can help it, ConnectionError where the Hub could not be asked.
    """
    path = Path(config.dataset).expanduser()
    if path.exists():
        return open_local(path, config, tokenizer)
    if path.suffix in LOCAL_SUFFIXES or names_a_place(config.dataset):
        raise ValueError(f"dataset must exist, got {config.dataset}; check the path")
    return open_hub(config)


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


# --- local ---


def open_local(path: Path, config: CollectConfig, tokenizer: PreTrainedTokenizerBase) -> Documents:
    path = split_folder(path, config.split)
    count, fetch = local_source(path, config, tokenizer)
    if not count:
        raise ValueError(
            f"dataset must hold a document, got none in {path.name}; "
            "a folder holds .txt files, or is made by save_to_disk"
        )
    provenance = {"dataset": path.name, "dataset_revision": None, "dataset_config": None}
    order = partial(permuted, fetch, count, config.seed)
    return Documents(digest_path(path), {**provenance, "split": config.split}, order)


def local_source(
    path: Path, config: CollectConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, Fetch]:
    """How many documents there are, and what fetches them by index."""
    if path.suffix == ".bin":
        return token_source(path, tokenizer)
    if path.suffix == ".txt":
        paragraphs = re.split(r"\n\s*\n", read_text(path).strip())
        return len(paragraphs), lambda indices: [paragraphs[i] for i in indices]
    if (texts := text_files(path)) is not None:
        return len(texts), lambda indices: [read_text(texts[i]) for i in indices]
    if path.is_dir():
        return table_source(datasets.load_from_disk(str(path)), config)
    if path.suffix not in FILE_KINDS:
        raise ValueError(
            f"a local dataset is a {', '.join(LOCAL_SUFFIXES)} file, a folder of .txt "
            f"or an arrow folder, got {path.name}; convert it"
        )
    return table_source(load_table(path), config)


def split_folder(path: Path, split: str) -> Path:
    """The folder of one split, where `path` is an arrow folder that holds several."""
    if not (path / "dataset_dict.json").exists():
        return path
    splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)} in {path.name}, got {split}")
    return path / split


def text_files(path: Path) -> list[Path] | None:
    """The .txt files of a folder, by name: a document each; None for what is no such folder."""
    if path.is_file() or (path / "state.json").exists():
        return None
    return sorted(path.rglob("*.txt"))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text must be UTF-8, got {path.name}: {error}; convert it") from error


def load_table(path: Path) -> datasets.Dataset:
    if not path.stat().st_size:
        raise ValueError(f"dataset must hold a document, got the empty file {path.name}")
    try:
        return datasets.load_dataset(FILE_KINDS[path.suffix], data_files=str(path), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):  # such as a full disk: the cache is written here
            raise error.__cause__ from error
        why = first_line(error.__cause__ or error)
        raise ValueError(
            f"{path.name} cannot be read as {path.suffix[1:]}: {why}; repair it"
        ) from error


def table_source(table: datasets.Dataset, config: CollectConfig) -> tuple[int, Fetch]:
    check_column(table.column_names, config)
    texts = table.select_columns(config.text_column)
    return len(table), lambda indices: [
        text_of(row, config) for row in texts[indices][config.text_column]
    ]


def check_column(columns: Iterable[str], config: CollectConfig) -> None:
    if config.text_column not in (columns := list(columns)):
        raise ValueError(
            f"text_column must be a column of {config.dataset}, got {config.text_column}; "
            f"use one of {', '.join(columns)}"
        )


def text_of(value: object, config: CollectConfig) -> str:
    """The text of a row; a null one is an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"text_column must hold text, got {type(value).__name__} in {config.text_column}; "
            "name another"
        )
    return value


# --- Hub ---


def open_hub(config: CollectConfig) -> Documents:
    commit = resolve_commit(config)
    table = load_hub(config, commit)
    identity = (config.dataset, commit, config.dataset_config, config.split, config.text_column)
    return Documents(
        hashlib.sha256(json.dumps([*identity, config.streaming]).encode()).hexdigest(),
        {
            "dataset": config.dataset,
            "dataset_revision": commit,
            "dataset_config": config.dataset_config,
            "split": config.split,
        },
        hub_order(table, config),
    )


def hub_order(
    table: datasets.Dataset | datasets.IterableDataset, config: CollectConfig
) -> Callable[[int], Iterator[Document]]:
    if isinstance(table, datasets.IterableDataset):
        first = next(iter(table), None)
        if first is None:
            raise ValueError(f"dataset must hold a document, got {config.dataset} with none")
        check_column(first, config)
        return partial(streamed, table, config)
    count, fetch = table_source(table, config)
    if not count:
        raise ValueError(f"dataset must hold a document, got {config.dataset} with none")
    return partial(permuted, fetch, count, config.seed)


# --- orders ---


def permuted(fetch: Fetch, count: int, seed: int, start: int) -> Iterator[Document]:
    order = permutation(count, f"documents {seed}")
    for place in range(start, count, FETCH_DOCUMENTS):
        yield from fetch(order[place : place + FETCH_DOCUMENTS])


def streamed(
    table: datasets.IterableDataset, config: CollectConfig, start: int
) -> Iterator[Document]:
    """Shards in a seeded order through a seeded buffer: less mixed than a permutation, and to start
    at a place is to read what comes before it."""
    shuffled = table.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER)
    for row in islice(shuffled, start, None):
        yield text_of(row[config.text_column], config)


# --- digests ---


def arrow_files(path: Path) -> list[Path]:
    """The files of an arrow folder's table; not the caches that `datasets` leaves beside them."""
    state = json.loads((path / "state.json").read_text())
    return [path / one["filename"] for one in state["_data_files"]]


def digest_path(path: Path) -> str:
    """sha256 of a file's bytes, or of a folder's relative names and bytes."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for one in text_files(path) or arrow_files(path):
        digest.update(f"{one.relative_to(path).as_posix()}\0{digest_path(one)}\0".encode())
    return digest.hexdigest()
