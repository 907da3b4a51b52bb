"""What determines the rows of a store, and the check that a store and a command agree on it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mpcache.config import CollectConfig
from mpcache.storage.base import Storage
from mpcache.storage.tempfiles import is_temporary
from mpcache.store.format import (
    STORE_FILE,
    Layout,
    canonical_json,
    digest,
    is_store,
    read_store_file,
    seal,
)

# of the config; neither hookpoints nor storage dtype, so that both can differ for the same rows
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
# these came later: named only where they are on, so that older stores keep their fingerprints
_SWITCHES = ("autocast", "compile", "one_document_per_sequence")
# what a store does that lacks the key: it was made before there was a choice
_OLD_WAYS: dict[str, Any] = {
    **dict.fromkeys(_SWITCHES, False),
    "special_tokens": "parsed",
    "empty_documents": "kept",
    "chat_template": None,
}
# what asks for the old way
_OPTIONS = {
    "special_tokens": "--parse-special-tokens",
    "empty_documents": "--keep-empty-documents",
}


def identify(config: CollectConfig, digests: dict[str, str], attention: str) -> dict[str, Any]:
    """Everything that determines the rows; `digests` are those of model, tokenizer and dataset."""
    chosen = {name: getattr(config, name) for name in _DETERMINING}
    chosen |= {name: True for name in _SWITCHES if getattr(config, name)}
    if config.one_document_per_sequence:  # no document sees another, whatever the option says
        chosen["cross_document_attention"] = False
    if not config.parse_special_tokens:
        chosen["special_tokens"] = "text"
    if not config.keep_empty_documents:
        chosen["empty_documents"] = "left out"
    return {**chosen, **digests, "attention": attention}


def stored_settings(identity: Mapping[str, Any]) -> dict[str, bool]:
    """The settings of a collection that a store's identity knows better than its config.

    An older store's config lacks them, and their defaults are not what was done then.
    """
    ways = {**_OLD_WAYS, **identity}
    return {
        "parse_special_tokens": ways["special_tokens"] == "parsed",
        "keep_empty_documents": ways["empty_documents"] == "kept",
        "one_document_per_sequence": bool(ways["one_document_per_sequence"]),
    }


def layout_of(config: CollectConfig, token_dtype: str, *, token_flags: bool = False) -> Layout:
    """How a store of this config cuts its rows."""
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
    place: Storage, config: CollectConfig, identity: dict[str, Any], layout: Layout,
    provenance: dict[str, Any],
) -> None:  # fmt: skip
    """Make the store, or check that the one there holds the same rows in the same layout."""
    content = {
        "format": "mpcache",
        "format_version": layout.format_version,
        "fingerprint": digest(identity),
        "identity": identity,
        "layout": layout.as_json(),
        "config": asdict(config),
        "provenance": provenance,
    }
    if not is_store(place):
        check_no_foreign_objects(place)
        place.create(STORE_FILE, seal(content))
    found = read_store_file(place)
    _refuse_converted(place, found)
    for key in ("identity", "layout"):
        _refuse_difference(place, found[key], json_round_trip(content[key]))


def json_round_trip(content: Any) -> Any:
    """Content as it reads back from JSON, so that tuples compare as lists."""
    return json.loads(canonical_json(content))


def check_no_foreign_objects(place: Storage) -> None:
    """Raise ValueError where a new store would lie among other files."""
    others = not place.can_be_root() or any(not is_temporary(name) for name in place.object_names())
    if others and not is_store(place):  # another may have made the store just now
        raise ValueError(f"{place} exists and is no store; name a new or empty folder")


def _refuse_difference(place: Storage, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    stored_keys = set(stored)
    stored, wanted = {**_OLD_WAYS, **stored}, {**_OLD_WAYS, **wanted}
    different = [key for key in wanted if stored.get(key) != wanted[key]]
    if set(_OPTIONS) <= set(different) and not any(key in stored_keys for key in _OPTIONS):
        # of a lone .txt or .bin the digest follows these options: alone it says nothing
        different = [key for key in different if key != "dataset_digest"]
    if different:
        told = "; ".join(
            f"{key}: {stored.get(key)} there, {wanted[key]} asked" for key in different
        )
        old = [_OPTIONS.get(k, "") for k in different if stored.get(k) == _OLD_WAYS.get(k)]
        can_continue = len(old) == len(different) and all(old)
        remedy = f"continue it with {' '.join(old)}" if can_continue else "use its settings"
        raise ValueError(
            f"{place} was made from another model or with other settings ({told}); "
            f"{remedy}, or name another store"
        )


def dtype_history(dtype: str, provenance: Mapping[str, Any]) -> list[str]:
    """The storage dtypes that the rows of a store in `dtype` went through, from collection on."""
    found, source = [dtype], provenance.get("converted_from")
    while source:
        found.insert(0, source["dtype"])
        source = source.get("converted_from")
    return found


def _refuse_converted(place: Storage, found: dict[str, Any]) -> None:
    """Rows from the model would be rounded once, rows that went through another dtype twice.

    And a larger part can hold no collected part alone.
    """
    source = found["provenance"].get("converted_from")
    is_joined = found["layout"]["part_rows"] != found["identity"].get("part_rows")
    if source and (
        is_joined or len(set(dtype_history(found["layout"]["dtype"], found["provenance"]))) > 1
    ):
        raise ValueError(
            f"{place} was converted from {source['store']}, as {source['dtype']}, and nothing is "
            "collected into it; collect into that store, then give the same convert command again"
        )
