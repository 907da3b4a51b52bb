"""Remove a store, or what an interrupted copy or removal left of it."""

from dataclasses import dataclass
from pathlib import Path

from mpcache.errors import UsageError
from mpcache.maintenance.incoming_store import INCOMING, REMOVED
from mpcache.storage.base import Storage, open_storage
from mpcache.storage.temporary_names import is_temporary
from mpcache.store.array_spec import GROUP
from mpcache.store.object_paths import MARKS, STORE_FILE
from mpcache.store.store_metadata import is_store, parse_store_file, read_store_file


@dataclass(frozen=True)
class Removal:
    """What is to be removed: a store or half a store, and leftovers of earlier removals."""

    storages: tuple[Storage, ...]
    description: str
    "what it is, in words"


def plan_removal(store: str | Path | Storage) -> Removal:
    """Look at what is to be removed. Nothing is deleted.

    Raises:
        UsageError: this is not certainly a store, or it holds something else too.
    """
    storage = open_storage(store)
    if storage.is_link():
        raise UsageError(f"{storage} is a symbolic link; give the path of the store itself")
    leftovers = storage.removal_leftovers()
    if not storage.exists() and leftovers:
        return Removal(leftovers, "the rest of an interrupted removal")
    halves = () if is_store(storage) else (REMOVED, INCOMING)
    half = next((name for name in halves if storage.size(name) is not None), None)
    if half is not None:
        parse_store_file(storage.read(half), f"{storage}/{half}")
        description = "half of a store, copied or removed"
    else:
        read_store_file(storage)
        description = "a store"
    own = {STORE_FILE, GROUP, MARKS}
    foreign = [n for n in storage.children() if n not in own and not is_temporary(n)]
    if foreign:
        raise UsageError(
            f"{storage} also holds {foreign[0]!r}, which does not belong to a store; move "
            f"{foreign[0]!r} to another folder first"
        )
    return Removal((storage, *leftovers), description)


def remove(removal: Removal) -> None:
    """Delete for good. There is no store from the first moment on, also after an interruption."""
    for storage in removal.storages:
        storage.delete_all(STORE_FILE if is_store(storage) else INCOMING, REMOVED, MARKS)
