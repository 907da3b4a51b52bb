"""The store that a collection fills: the one that is named, or the right one below a root."""

from typing import Any

import typer

from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.validation import check_printable


def open_storage(
    store: str | None, root: str | None, config: CollectConfig
) -> tuple[Any, CollectConfig, Any]:
    """Where to collect, how, and what is there if that is all that was asked for."""
    if (store is None) == (root is None):
        raise UsageError("name either STORE or --root ROOT, the folder of stores that has it")
    if store is not None:
        check_printable(store)
        return store, config, None
    from mpcache.collection.find_store import find_store

    assert root is not None
    location = find_store(root, config)
    kept = [n for n in ("codec", "chunk_rows") if getattr(location.config, n) != getattr(config, n)]
    if kept:
        settings = ", ".join(f"{name} {getattr(location.config, name)}" for name in kept)
        typer.echo(f"{location.storage} exists with {settings}, which is kept", err=True)
    return location.storage, location.config, location.summary
