"""Which store a collection fills: the one that is named, or the one that fits in a root."""

from typing import TYPE_CHECKING

import typer

from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.untrusted_names import check_printable

if TYPE_CHECKING:  # the module below imports torch
    from mpcache.collection.find_store import StoreLocation


def locate_store(store: str | None, root: str | None, config: CollectConfig) -> "StoreLocation":
    """The store, the config that it is to be filled with, and a summary if it is complete.

    A store found in a root keeps its codec and its chunks.

    Raises:
        UsageError: neither or both of `store` and `root` are given.
    """
    if (store is None) == (root is None):
        given = "neither" if store is None else "both"
        raise UsageError(
            f"give either STORE or --root FOLDER_OF_STORES, got {given}; STORE is one store, "
            "--root is a folder that holds stores"
        )
    from mpcache.collection.find_store import StoreLocation, find_store
    from mpcache.storage.base import open_storage

    if store is not None:
        check_printable(store)
        return StoreLocation(open_storage(store), config, None)
    assert root is not None
    location = find_store(root, config)
    kept = [n for n in ("codec", "chunk_rows") if getattr(location.config, n) != getattr(config, n)]
    if kept:
        settings = ", ".join(f"{name}={getattr(location.config, name)}" for name in kept)
        typer.echo(
            f"note: {location.storage} exists with {settings}; it keeps these settings", err=True
        )
    return location
