"""What the `store.json` of a store says of it."""

from typing import Any

import numpy as np

from mpcache.storage.base import Storage
from mpcache.store.format import Layout, digest, read_store_file


class Description:
    """What a store is made from and how it is laid out; rows are not looked at."""

    def __init__(self, place: Storage) -> None:
        """Raises ValueError where there is no store, DamagedStoreError for damage."""
        content = read_store_file(place)
        self.storage = place
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
        found = self.provenance.get("tokenizer", {}).get("special_ids")
        return None if found is None else tuple(map(int, found))

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
