"""What `store.json` says about a store: read, checked, and as attributes."""

import json
from typing import Any

import numpy as np

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.storage.base import Storage
from mpcache.store.object_paths import STORE_FILE
from mpcache.store.part_layout import FORMAT_VERSIONS, Layout
from mpcache.store.sealed_json import digest, unseal


class StoreMetadata:
    """What `store.json` says: what a store is made from, and how it is laid out."""

    def __init__(self, storage: Storage) -> None:
        """Raises UsageError where there is no store, DamagedStoreError for damage."""
        content = read_store_file(storage)
        self.storage = storage
        self.fingerprint: str = content["fingerprint"]
        self.identity: dict[str, Any] = content["identity"]
        self.config: dict[str, Any] = content["config"]
        self.provenance: dict[str, Any] = content["provenance"]
        self.layout = Layout(**content["layout"])
        self.digest: str = digest(content)

    @property
    def source(self) -> str:
        """Model and dataset, in words."""
        return f"{self.provenance['model']['model']} on {self.provenance['dataset']['dataset']}"

    @property
    def ctx_len(self) -> int:
        return self.layout.ctx_len

    @property
    def part_rows(self) -> int:
        return self.layout.part_rows

    @property
    def chunk_rows(self) -> int:
        return self.layout.chunk_rows

    @property
    def special_ids(self) -> tuple[int, ...] | None:
        """Token ids that the tokenizer calls special; None: the store does not tell."""
        ids = self.provenance.get("tokenizer", {}).get("special_ids")
        return None if ids is None else tuple(map(int, ids))

    @property
    def largest_token_id(self) -> int:
        """The largest token id that can be in the store, as far as its provenance says."""
        known = self.provenance.get("tokenizer", {}).get("largest_id")
        largest = np.iinfo(self.layout.token_dtype).max if known is None else known
        return int(largest)

    @property
    def has_lone_documents(self) -> bool:
        """Whether the model saw each document alone, in pieces of at most ctx_len tokens."""
        return bool(self.identity.get("one_document_per_sequence"))

    @property
    def has_assistant(self) -> bool:
        """Whether the store says which tokens the assistant of a conversation wrote."""
        return "chat_template" in self.identity


def is_store(storage: Storage) -> bool:
    """Whether a store was made there."""
    return storage.exists(STORE_FILE)


def read_store_file(storage: Storage) -> dict[str, Any]:
    """Content of `store.json`; raises UsageError for no store and for an unknown format version."""
    if not is_store(storage):
        raise UsageError(
            f"{storage} is not a store: it has no {STORE_FILE}; give the path of a store, or "
            "make a store with mpcache collect"
        )
    return parse_store_file(storage.read(STORE_FILE), f"{storage}/{STORE_FILE}")


def parse_store_file(data: bytes, file: str) -> dict[str, Any]:
    """Content of a `store.json`, checked as far as is possible without the rest of the store."""
    check_format_version(data, file)
    content = unseal(data, file)
    try:
        layout = Layout(**content["layout"])
        if content["format_version"] != layout.format_version:
            raise ValueError("format_version and layout contradict each other")
        is_valid = content["fingerprint"] == digest(content["identity"])
        is_valid = is_valid and all(
            isinstance(content[key], dict) for key in ("config", "provenance")
        )
        is_valid = is_valid and all(content["provenance"][key][key] for key in ("model", "dataset"))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedStoreError(f"{file} is damaged: {error}") from error
    if not is_valid:
        raise DamagedStoreError(f"{file} is damaged: its fields contradict each other")
    return content


def check_format_version(data: bytes, file: str) -> None:
    """Raise UsageError for an unknown version; comes before the seal, which versions may change."""
    try:
        version = json.loads(data)["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # the seal will tell that the file is damaged
    if version not in FORMAT_VERSIONS or type(version) is not int:
        raise UsageError(
            f"{file} has format version {version}, but this version of mpcache reads only "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}; use the version of mpcache that made "
            "the store"
        )
