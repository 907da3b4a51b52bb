"""A store that is being copied or converted. It becomes a store at the end, all at once.

`store.json` gets its name last: an incomplete copy is never taken for a store, and the same call
continues with it.
"""

from collections.abc import Iterable

from mpcache.errors import UsageError
from mpcache.storage.base import Storage
from mpcache.store.fingerprint import check_no_foreign_objects
from mpcache.store.object_paths import STORE_FILE
from mpcache.store.part_layout import Layout
from mpcache.store.store_metadata import is_store
from mpcache.store.writer import check_object_size
from mpcache.untrusted_names import check_printable

INCOMING = f"{STORE_FILE}.incoming.partial"  # becomes store.json
REMOVED = f"{STORE_FILE}.removed.partial"  # was store.json


def check_not_nested(source: Storage, target: Storage) -> None:
    if source.is_within(target) or target.is_within(source):
        raise UsageError(
            "the new store and its source must be separate folders, neither inside the other, got "
            f"{target} and {source}; give another path for the new store"
        )


def begin_store(target: Storage, store_file: bytes, layout: Layout, widths: Iterable[int]) -> None:
    """Prepare the folder or prefix that becomes a store with this `store.json`, or find it again.

    Raises:
        UsageError: something else is there, or a part is too large for an object of a bucket.
    """
    check_printable(target)
    check_object_size(target, layout, widths)
    if is_store(target):
        if target.read(STORE_FILE) != store_file:
            raise UsageError(f"{target} already holds another store; give a new or empty folder")
        return
    if target.size(REMOVED) is not None:
        raise UsageError(
            f"{target} is a store whose removal was interrupted; run mpcache remove {target} to "
            "finish the removal, or give another path"
        )
    if target.size(INCOMING) is None:
        check_no_foreign_objects(target)
        target.create(INCOMING, store_file)
    elif target.read(INCOMING) != store_file:
        raise UsageError(
            f"{target} holds an unfinished copy of another store; finish that copy, remove it "
            f"with mpcache remove {target}, or give another path"
        )


def finish_store(target: Storage, store_file: bytes) -> None:
    """Make a store of all that has arrived."""
    target.create(STORE_FILE, store_file)
    target.delete(INCOMING)
