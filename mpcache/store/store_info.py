"""A description of a store: provenance, settings and progress."""

from pathlib import Path
from typing import Any

from mpcache.storage.base import Storage
from mpcache.store.collection_extent import extent_of
from mpcache.store.object_paths import TOKENS, acts_array
from mpcache.store.reader import Store, open_store


def store_info(where: str | Path | Storage) -> dict[str, Any]:
    """Provenance, rows wanted, and rows, bytes and parts of each array, as values for JSON.

    Raises:
        UsageError: there is no store.
    """
    store = open_store(where)
    planned, extent = set(store.part_numbers(TOKENS)), extent_of(store)
    return {
        "store": str(store.storage),
        "fingerprint": store.fingerprint,
        "identity": store.identity,
        "provenance": store.provenance,
        "dtype": store.layout.dtype,
        "codec": store.layout.codec,
        "part_rows": store.part_rows,
        "chunk_rows": store.chunk_rows,
        "parts_planned": len(planned),
        "rows_planned": _rows(store, TOKENS),
        "empty_documents": store.tokens.empty_documents(),
        "rows_wanted": extent.rows_wanted,
        "exhausted": extent.exhausted,
        "shortfall": extent.shortfall,
        "hookpoints": [_side_info(store, h, s) for h in store.hookpoints for s in store.sides(h)],
    }


def _side_info(store: Store, hookpoint: str, side: str) -> dict[str, Any]:
    array = acts_array(hookpoint, side)
    marks = store.marks(array)
    return {
        "hookpoint": hookpoint,
        "side": side,
        "width": store.width(hookpoint, side),
        "parts": len(marks),
        "rows": _rows(store, array),
        "rows_validation": sum(m.rows for m in marks if m.split == "validation"),
        "bytes": sum(m.stored_bytes for m in marks),
        "nonfinite": store.acts.nonfinite(hookpoint, side),
    }


def _rows(store: Store, array: str) -> int:
    return sum(mark.rows for mark in store.marks(array))
