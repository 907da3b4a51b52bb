"""The model, the tokenizer and the dataset that a store was collected from, loaded when needed."""

import functools
from collections.abc import Sequence
from typing import Any

from mpcache.collection.producer import ActivationProducer, load_for_collection
from mpcache.config import CollectConfig, RepairConfig
from mpcache.data.dataset import open_documents
from mpcache.data.documents import Documents
from mpcache.errors import DamagedStoreError, MpcacheError, UsageError
from mpcache.model.loading import load_tokenizer
from mpcache.model.model_config import load_vocabulary
from mpcache.model.model_identity import tokenizer_digest
from mpcache.store.fingerprint import stored_settings
from mpcache.store.reader import Store


class NoDatasetError(MpcacheError):
    """The dataset that a store was made from is not available. The message says why."""


class OriginalCollection:
    """Each part of it is compared with the store's identity when it is loaded.

    Raises:
        UsageError: the model or the tokenizer is another one, or is not available.
        NoDatasetError: the dataset is another one, or is not available.
    """

    def __init__(self, store: Store, config: CollectConfig) -> None:
        self.store, self.config = store, config

    @functools.cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.config)
        self._check_same("tokenizer", tokenizer_digest(tokenizer), "model")
        return tokenizer

    @functools.cached_property
    def documents(self) -> Documents:
        vocabulary = load_vocabulary(self.config, self.tokenizer)
        try:
            documents = open_documents(self.config, vocabulary)
            self._check_same("dataset", documents.digest, "dataset")
        except (ValueError, OSError) as error:  # libraries raise plain ValueErrors
            raise NoDatasetError(str(error)) from error
        return documents

    @functools.cached_property
    def producer(self) -> ActivationProducer:
        loaded = load_for_collection(self.config)
        self._check_same("model", loaded.digests["model_digest"], "model")
        return ActivationProducer(self.config, loaded)

    def close(self) -> None:
        """Remove the hooks from the model, if the model was loaded."""
        if "producer" in self.__dict__:
            self.producer.close()

    def _check_same(self, name: str, digest: str | None, option: str) -> None:
        if digest != self.store.identity.get(f"{name}_digest"):
            raise UsageError(
                f"{self.store.storage} was collected with another {name} than that of "
                f"{getattr(self.config, option)}; give the original with --{option}"
            )


def original_config(
    store: Store, config: RepairConfig, hookpoints: Sequence[str], dtype: str, unit_rows: int
) -> CollectConfig:
    """The settings of the collection, with what has moved since. Parts are single units.

    Raises:
        DamagedStoreError: the store has settings that this version does not know.
    """
    moved = {name: getattr(config, name) for name in ("model", "revision", "dataset")}
    settings = {
        **store.config,
        **stored_settings(store.identity),
        **{name: value for name, value in moved.items() if value is not None},
        "hookpoints": tuple(hookpoints) or ("*",),  # must not be empty, even if none is needed
        "dtype": dtype,
        "part_rows": unit_rows,
        "chunk_rows": unit_rows,
        "device": config.device,
        # The store may belong to somebody else, who must not decide this.
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        return CollectConfig(**settings)
    except TypeError as error:
        raise DamagedStoreError(
            f"{store.storage} has settings that this version of mpcache does not know ({error}); "
            "use the version of mpcache that made the store"
        ) from error
