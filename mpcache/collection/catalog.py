"""The stores of a root: a folder, or a bucket's prefix, that a team keeps its stores in.

Only what lies directly in the root counts. Links and names that begin with a dot do not.
"""

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.storage.base import Storage, open_storage
from mpcache.store.collection_extent import Extent, extent_of
from mpcache.store.object_paths import TOKENS
from mpcache.store.reader import Store, open_store
from mpcache.store.store_metadata import is_store
from mpcache.untrusted_names import check_printable


@dataclass(frozen=True)
class UnreadableStore:
    """A store that cannot be opened."""

    name: str
    "its folder's name"
    error: Exception


@dataclass(frozen=True, kw_only=True)
class StoreEntry:
    """One store of a root."""

    store: str
    "its folder's name"
    model: str | None
    dataset: str | None
    hookpoints: tuple[str, ...]
    dtype: str | None
    rows: int
    "rows that all its hookpoints have"
    rows_wanted: int
    "rows asked for; of an extended store, the most that were asked for, in whole parts"
    exhausted: bool
    "the dataset ended before the rows wanted"
    shortfall: str | None
    "why there will be fewer rows than were wanted"
    bytes: int
    "bytes of all that is committed"
    complete: float
    "share of the rows wanted that its arrays have, from 0 to 1"
    changed: str | None
    "time of the last commit"
    age_seconds: float | None
    "time since the last commit"
    fault: str | None
    "why the store cannot be read"


def list_stores(root: str | Path | Storage) -> tuple[StoreEntry, ...]:
    """Describe the stores of a root, in the order of their names. Reads marks, not arrays.

    Args:
        root: Path, or `s3://` or `gs://` URL, of a folder that holds stores.

    Raises:
        UsageError: The root does not exist, is no folder, or is itself a store.

    Example:
        ```python
        from mpcache import list_stores

        for entry in list_stores("."):
            print(entry.store, entry.model, f"{entry.complete:.0%}")
        ```
    """
    storage = open_storage(root)
    check_root(storage)
    if not storage.exists():
        raise UsageError(
            f"the folder of stores {storage} does not exist; give the path or URL of a folder "
            "that holds stores"
        )
    return tuple(_entry(store) for store in open_stores(storage))


def check_root(root: Storage) -> None:
    """Raise UsageError if this cannot be a root of stores."""
    check_printable(root)
    if is_store(root):
        raise UsageError(
            f"{root} is a store, not a folder of stores; give the folder above the store"
        )
    if not root.can_be_root():
        raise UsageError(f"{root} is not a folder; give a folder that holds stores")


def open_stores(root: Storage) -> Iterator[Store | UnreadableStore]:
    """The stores of a root in the order of their names, also those that cannot be opened."""
    for name in root.children():
        try:
            storage = root.child(name)
        except ValueError:  # no URL leads there, so no store was made there
            continue
        if name.startswith(".") or root.is_link(name) or not is_store(storage):
            continue
        try:
            yield open_store(storage)
        except (DamagedStoreError, ValueError, PermissionError) as error:
            yield UnreadableStore(name, error)


def _entry(store: Store | UnreadableStore) -> StoreEntry:
    if isinstance(store, UnreadableStore):
        return _entry_of_unreadable(store)
    try:
        return _entry_of_store(store)
    except DamagedStoreError as error:
        return _entry_of_unreadable(UnreadableStore(store.storage.name, error))


def _entry_of_unreadable(store: UnreadableStore) -> StoreEntry:
    return StoreEntry(
        store=store.name, model=None, dataset=None, hookpoints=(), dtype=None, rows=0,
        rows_wanted=0, exhausted=False, shortfall=None, bytes=0, complete=0.0, changed=None,
        age_seconds=None, fault=str(store.error),
    )  # fmt: skip


def _entry_of_store(store: Store) -> StoreEntry:
    marks = [mark for array in store.arrays for mark in store.marks(array)]
    acts = [array for array in store.arrays if array.startswith("acts/")]
    whole = set(store.part_numbers(TOKENS)).intersection(*(store.part_numbers(a) for a in acts))
    times = [time for mark in marks if (time := _parse_time(mark.time)) is not None]
    changed = max(times, default=None)
    now = datetime.datetime.now(datetime.UTC)
    extent = extent_of(store)
    return StoreEntry(
        store=store.storage.name,
        model=str(store.provenance["model"]["model"]),
        dataset=str(store.provenance["dataset"]["dataset"]),
        hookpoints=store.hookpoints,
        dtype=store.layout.dtype,
        rows=sum(store.mark(part, TOKENS).rows for part in whole) if acts else 0,
        rows_wanted=extent.rows_wanted,
        exhausted=extent.exhausted,
        shortfall=extent.shortfall,
        bytes=sum(mark.stored_bytes for mark in marks),
        complete=_share_complete(store, acts, extent),
        changed=None if changed is None else changed.isoformat(timespec="seconds"),
        # the clock of another machine may be ahead of this machine's
        age_seconds=None if changed is None else max(0.0, (now - changed).total_seconds()),
        fault=None,
    )


def _share_complete(store: Store, acts: Sequence[str], extent: Extent) -> float:
    """Share of the rows wanted, mean over the arrays of activations."""
    if not acts:
        return 0.0
    rows = sum(mark.rows for array in acts for mark in store.marks(array))
    return min(1.0, extent.share(rows / len(acts), store.part_rows))


def _parse_time(text: object) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo else None
