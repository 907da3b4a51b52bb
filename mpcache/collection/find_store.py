"""Where below a root a collection belongs: the store that holds its rows, or a new store."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcache.collection.catalog import check_root, open_stores
from mpcache.collection.summary import CollectSummary, summarize
from mpcache.collection.wanted_parts import CollectionPlan
from mpcache.config import CollectConfig
from mpcache.data.dataset import open_documents
from mpcache.data.dataset_files import LOCAL_SUFFIXES
from mpcache.data.tokenization import chat_template_identity, find_chat_template
from mpcache.errors import UsageError
from mpcache.model.file_snapshot import files_digest
from mpcache.model.hookpoint_patterns import resolve_sides
from mpcache.model.loading import load_model, load_tokenizer
from mpcache.model.model_config import load_vocabulary
from mpcache.model.model_identity import library_version, model_digest, tokenizer_digest
from mpcache.model.model_source import short_name
from mpcache.model.skeleton import skeleton
from mpcache.storage.base import Storage, open_storage
from mpcache.store.fingerprint import identify
from mpcache.store.reader import Store
from mpcache.store.sealed_json import digest, json_round_trip
from mpcache.store.store_metadata import is_store, read_store_file

_NAME_LENGTH = 48  # characters that the name of a model or dataset has in a folder's name
_PREFIX_LENGTH = 12  # hexadecimal digits of a fingerprint in a folder's name


@dataclass(frozen=True)
class StoreLocation:
    """Where a collection belongs."""

    storage: Storage
    config: CollectConfig
    "as given, with the codec and the chunks of the store if it exists"
    summary: CollectSummary | None
    "what the store holds, if it holds all that was asked for"


def find_store(where: str | Path | Storage, config: CollectConfig) -> StoreLocation:
    """The store below a root that holds these rows, or where the new store is to be created.

    Loads the model's weights only if no store names the model's files.

    Raises:
        UsageError: this is not a root, or a store holds the rows in another dtype only.
    """
    root = open_storage(where)
    check_root(root)
    stores = tuple(store for store in open_stores(root) if isinstance(store, Store))
    identity = _identity(stores, config)
    # A store of larger parts may hold these rows, but it does not have their parts.
    same = [
        store
        for store in stores
        if store.fingerprint == digest(identity) and store.part_rows == config.part_rows
    ]
    if not same:
        return StoreLocation(_new_storage(root, config, digest(identity)), config, None)
    store = _with_dtype(same, config)
    layout = store.layout
    config = dataclasses.replace(config, codec=layout.codec, chunk_rows=layout.chunk_rows)
    sides = resolve_sides(config.hookpoints, skeleton(config))
    plan = CollectionPlan(sides, layout.parts_for(config.rows))
    summary = summarize(store, plan, config.rows) if plan.is_complete(store) else None
    return StoreLocation(store.storage, config, summary)


def _identity(stores: Sequence[Store], config: CollectConfig) -> dict[str, Any]:
    """What determines the rows: taken from a store that was made from the same files, if any."""
    tokenizer = load_tokenizer(config)
    documents = open_documents(config, load_vocabulary(config, tokenizer))
    digests = {
        "dataset_digest": documents.digest,
        **chat_template_identity(find_chat_template(documents, tokenizer, config)),
    }
    if (own_digest := tokenizer_digest(tokenizer)) is not None:
        digests["tokenizer_digest"] = own_digest
    similar = [store for store in stores if _differs_in_model_only(store, config, digests)]
    if similar and (files := files_digest(config)) is not None:
        here = {"model_files": files, "transformers_version": library_version("transformers")}
        for store in similar:
            if store.provenance["model"].items() >= here.items():
                return store.identity
    model, _ = load_model(config, tokenizer=tokenizer)
    digests["model_digest"] = model_digest(model)
    identity: dict[str, Any] = json_round_trip(
        identify(config, digests, str(model.config._attn_implementation))
    )
    return identity


def _differs_in_model_only(store: Store, config: CollectConfig, digests: dict[str, str]) -> bool:
    """Whether a store's identity is that of the collection, the model's digest aside."""
    wanted = identify(config, digests, config.attention)
    stored = {k: v for k, v in store.identity.items() if k != "model_digest"}
    return bool(stored == json_round_trip(wanted))


def _with_dtype(same: Sequence[Store], config: CollectConfig) -> Store:
    """Of stores of the same rows, the largest that has the wanted dtype."""
    stores = [store for store in same if store.layout.dtype == config.dtype]
    if not stores:
        other = max(same, key=_committed_parts)
        raise UsageError(
            f"{other.storage} already holds these rows, with dtype {other.layout.dtype} instead of "
            f"{config.dtype}; convert them: run mpcache convert {other.storage} "
            f"{other.storage}-{config.dtype} --dtype {config.dtype}"
        )
    return max(stores, key=_committed_parts)


def _committed_parts(store: Store) -> int:
    return sum(len(store.part_numbers(array)) for array in store.arrays)


def _new_storage(root: Storage, config: CollectConfig, fingerprint: str) -> Storage:
    """Storage of a new store, with a readable name that cannot lead out of the root."""
    dataset = Path(short_name(config.dataset.split(",")[0]))
    while dataset.suffix.lower() in LOCAL_SUFFIXES:
        dataset = dataset.with_suffix("")
    readable = f"{safe_folder_name(short_name(config.model))}-{safe_folder_name(dataset.name)}"
    short = root.child(f"{readable}-{fingerprint[:_PREFIX_LENGTH]}")
    if is_store(short) and read_store_file(short)["fingerprint"] != fingerprint:
        return root.child(f"{readable}-{fingerprint}")
    return short


def safe_folder_name(name: str) -> str:
    """The name with only characters that every file system accepts in a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_NAME_LENGTH].strip("-.") or "unnamed"
