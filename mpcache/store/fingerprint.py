"""What determines the rows of a store, and the check that a store and a command agree on it."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.storage.base import Storage
from mpcache.storage.temporary_names import is_temporary
from mpcache.store.object_paths import STORE_FILE
from mpcache.store.part_layout import Layout
from mpcache.store.sealed_json import digest, json_round_trip, seal
from mpcache.store.store_metadata import is_store, read_store_file

# fields of the config; without hookpoints and storage dtype, which may differ for the same rows
_DETERMINING = (
    "model_dtype",
    "ctx_len",
    "part_rows",
    "batch_sequences",
    "bos",
    "eos",
    "cross_document_attention",
    "dataset_config",
    "split",
    "text_column",
    "streaming",
    "validation_every",
    "seed",
)
# added later: recorded only where they are on, so that older stores keep their fingerprints
_SWITCHES = ("autocast", "compile", "one_document_per_sequence")
# settings of a store that lacks the key: it was made before there was a choice
_OLD_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(_SWITCHES, False),
    "special_tokens": "parsed",
    "empty_documents": "kept",
    "chat_template": None,
}
# options that ask for the old setting
_OLD_OPTIONS = {
    "special_tokens": "--parse-special-tokens",
    "empty_documents": "--keep-empty-documents",
}


def identify(config: CollectConfig, digests: dict[str, str], attention: str) -> dict[str, Any]:
    """Everything that determines the rows; `digests` has those of model, tokenizer and dataset."""
    chosen = {name: getattr(config, name) for name in _DETERMINING}
    chosen |= {name: True for name in _SWITCHES if getattr(config, name)}
    if config.one_document_per_sequence:  # whatever the option says: no document sees another one
        chosen["cross_document_attention"] = False
    if not config.parse_special_tokens:
        chosen["special_tokens"] = "text"
    if not config.keep_empty_documents:
        chosen["empty_documents"] = "left out"
    return {**chosen, **digests, "attention": attention}


def stored_settings(identity: Mapping[str, Any]) -> dict[str, bool]:
    """Settings of a collection that have to come from a store's identity, not from its config.

    The config of an older store lacks them, and today's defaults are not what was done then.
    """
    settings = {**_OLD_SETTINGS, **identity}
    return {
        "parse_special_tokens": settings["special_tokens"] == "parsed",
        "keep_empty_documents": settings["empty_documents"] == "kept",
        "one_document_per_sequence": bool(settings["one_document_per_sequence"]),
    }


def layout_of(config: CollectConfig, token_dtype: str, *, token_flags: bool = False) -> Layout:
    """Layout of a store of this config."""
    return Layout(
        ctx_len=config.ctx_len,
        part_rows=config.part_rows,
        chunk_rows=config.chunk_rows,
        validation_every=config.validation_every,
        dtype=config.dtype,
        codec=config.codec,
        token_dtype=token_dtype,
        token_flags=token_flags,
    )


def create_or_check_store(
    storage: Storage, config: CollectConfig, identity: dict[str, Any], layout: Layout,
    provenance: dict[str, Any],
) -> None:  # fmt: skip
    """Create the store, or check that the one there holds the same rows in the same layout.

    Raises UsageError where there is another store, or anything else.
    """
    content = {
        "format": "mpcache",
        "format_version": layout.format_version,
        "fingerprint": digest(identity),
        "identity": identity,
        "layout": layout.as_json(),
        "config": asdict(config),
        "provenance": provenance,
    }
    if not is_store(storage):
        check_no_foreign_objects(storage)
        storage.create(STORE_FILE, seal(content))
    stored = read_store_file(storage)
    _check_not_rounded(storage, stored)
    for key in ("identity", "layout"):
        _check_same(storage, stored[key], json_round_trip(content[key]))


def check_no_foreign_objects(storage: Storage) -> None:
    """Raise UsageError where a new store would lie among other files."""
    is_foreign = not storage.can_be_root() or any(
        not is_temporary(name) for name in storage.object_names()
    )
    if is_foreign and not is_store(storage):  # another process may have made the store just now
        raise UsageError(f"{storage} exists and is not a store; give a new or empty folder")


def _check_same(storage: Storage, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    has_new_keys = any(key in stored for key in _OLD_OPTIONS)
    stored, wanted = {**_OLD_SETTINGS, **stored}, {**_OLD_SETTINGS, **wanted}
    different = [key for key in wanted if stored.get(key) != wanted[key]]
    if set(_OLD_OPTIONS) <= set(different) and not has_new_keys:
        # the digest of a lone .txt or .bin file depends on these options: it adds no information
        different = [key for key in different if key != "dataset_digest"]
    if not different:
        return
    differences = "; ".join(
        f"{key}: {stored.get(key)} in the store, {wanted[key]} requested" for key in different
    )
    options = [
        _OLD_OPTIONS.get(key, "") for key in different if stored.get(key) == _OLD_SETTINGS.get(key)
    ]
    can_continue = len(options) == len(different) and all(options)
    remedy = (
        f"add {' '.join(options)} to continue the store"
        if can_continue
        else "use the settings of the store"
    )
    raise UsageError(
        f"{storage} was made from another model or with other settings ({differences}); "
        f"{remedy}, or give another store"
    )


def dtype_history(dtype: str, provenance: Mapping[str, Any]) -> list[str]:
    """The storage dtypes that the rows of a store in `dtype` had, from collection on."""
    history, source = [dtype], provenance.get("converted_from")
    while source:
        history.insert(0, source["dtype"])
        source = source.get("converted_from")
    return history


def _check_not_rounded(storage: Storage, stored: dict[str, Any]) -> None:
    """Raise UsageError for a converted store that new rows do not fit into.

    Rows from the model would be rounded once, rows that went through another dtype twice. And a
    part of a store that was converted into larger parts holds several collected parts.
    """
    source = stored["provenance"].get("converted_from")
    is_joined = stored["layout"]["part_rows"] != stored["identity"].get("part_rows")
    if source and (
        is_joined or len(set(dtype_history(stored["layout"]["dtype"], stored["provenance"]))) > 1
    ):
        raise UsageError(
            f"{storage} was converted from {source['store']} (dtype {source['dtype']}), so no "
            f"rows can be collected into it; collect into {source['store']}, then run the same "
            "convert command again"
        )
