"""Copy whole stores, and remove them.

What arrives becomes a store at its end, all at once, when `store.json` gets its name: half a copy
is never taken for a store, and the same call goes on with it.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash
from tqdm import tqdm

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map
from mpcache.storage.base import Storage, open_storage
from mpcache.storage.tempfiles import is_temporary
from mpcache.store.array_metadata import check_metadata
from mpcache.store.array_spec import GROUP
from mpcache.store.description import is_store, parse_store_file, read_store_file
from mpcache.store.fingerprint import check_no_foreign_objects
from mpcache.store.format import MARKS, STORE_FILE, array_specs, mark_path
from mpcache.store.layout import Layout
from mpcache.store.mark import ObjectRecord
from mpcache.store.reader import Store, open_store
from mpcache.store.writer import Writer, check_object_size
from mpcache.validation import check_printable

_INCOMING = f"{STORE_FILE}.incoming.partial"  # what is to become store.json
_REMOVED = f"{STORE_FILE}.removed.partial"  # what was store.json


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a copy or a conversion did."""

    store: str
    parts: int
    "parts of arrays, a mark each, that are there now"
    written: int
    "of these, written by this call"
    bytes: int
    "of objects written by this call"
    nonfinite: int = 0
    "values that became infinite in the new dtype"


def copy(
    source: str | Path | Storage,
    target: str | Path | Storage,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
) -> Moved:
    """Copy what is committed, comparing each object with its mark on the way.

    Goes on with half a copy, and adds to a copy what its source has got since. Memory, for each
    part in work at a time: a megabyte; of a bucket 64 MiB; to a bucket also the object itself.

    Raises:
        ValueError: `target` holds something else; nothing was written.
        DamagedStoreError: an object of the source is not what was committed.
    """
    store, to = open_store(source), open_storage(target)
    data = store.storage.read(STORE_FILE)
    refuse_nesting(store.storage, to)
    widths = [store.width(name, side) for name in store.hookpoints for side in store.sides(name)]
    receive(to, data, store.layout, widths)
    writer = Writer(to, store.layout, store.fingerprint)
    marks = [(part, array) for array in store.arrays for part in store.part_numbers(array)]
    for array in store.arrays:
        grow_alike(store, array, writer)
    found = ordered_map(functools.partial(copy_part, store, writer), marks, parallel, quiet=quiet)
    written = list(tqdm(found, "copy", len(marks), unit="mark", disable=quiet))
    arrived(to, data)
    return Moved(
        store=str(to), parts=len(marks), written=sum(size > 0 for size in written),
        bytes=sum(written),
    )  # fmt: skip


def grow_alike(store: Store, array: str, writer: Writer) -> None:
    """Let a new store's array span the parts of its source's."""
    width = store.mark(store.part_numbers(array)[0], array).width
    writer.grow(
        array, check_metadata(store.storage, array_specs(array, store.layout, width)[0]), width
    )


def copy_part(store: Store, writer: Writer, task: tuple[int, str]) -> int:
    """Copy what the mark of a part and array commits, the mark last; bytes written."""
    part, array = task
    mark = store.mark(part, array)
    sources = {n: _compared(store.storage, n, record) for n, record in mark.objects.items()}
    data = store.storage.read(mark_path(part, array))
    is_new = writer.adopt(part, array, data, sources)
    return mark.stored_bytes if is_new else 0


def _compared(place: Storage, name: str, record: ObjectRecord) -> Iterator[bytes]:
    """The bytes of an object; raises at their end if they are not those that the mark names."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        for piece in place.read_pieces(name):
            digest.update(piece)
            size += len(piece)
            yield piece
    except FileNotFoundError:
        raise DamagedStoreError(f"{place}/{name} is missing, though it was committed") from None
    if (size, digest.hexdigest()) != (record.bytes, record.xxh3_128):
        raise DamagedStoreError(
            f"{place}/{name} is damaged: its bytes differ from what was committed"
        )


# --- arriving ---


def refuse_nesting(source: Storage, to: Storage) -> None:
    if source.is_within(to) or to.is_within(source):
        raise UsageError(f"{to} and {source} must not lie in each other; name another place")


def receive(to: Storage, data: bytes, layout: Layout, widths: Iterable[int]) -> None:
    """Make the place that is to become a store with this `store.json`, or find it again."""
    check_printable(to)
    check_object_size(to, layout, widths)
    if is_store(to):
        if to.read(STORE_FILE) != data:
            raise UsageError(f"{to} is another store; name a new or empty folder")
        return
    if to.size(_REMOVED) is not None:
        raise UsageError(
            f"{to} is half removed; finish that with mpcache remove {to}, or name another place"
        )
    if to.size(_INCOMING) is None:
        check_no_foreign_objects(to)
        to.create(_INCOMING, data)
    elif to.read(_INCOMING) != data:
        raise UsageError(
            f"{to} is half of another copy; finish that one, remove it, or name another place"
        )


def arrived(to: Storage, data: bytes) -> None:
    """Make a store of what has arrived."""
    to.create(STORE_FILE, data)
    to.delete(_INCOMING)


# --- leaving ---


@dataclass(frozen=True)
class Leaving:
    """What is to be removed: a store, or half a copy, and what earlier removals left of it."""

    places: tuple[Storage, ...]
    told: str


def find_removable(where: str | Path | Storage) -> Leaving:
    """Look at what is to be removed; raises ValueError for what is not certainly a store."""
    place = open_storage(where)
    if place.is_link():
        raise UsageError(f"{place} is a symbolic link; name the store itself")
    rests = place.removal_leftovers()
    if not place.exists() and rests:
        return Leaving(rests, "the rest of an interrupted removal")
    halves = () if is_store(place) else (_REMOVED, _INCOMING)
    half = next((name for name in halves if place.size(name) is not None), None)
    if half is not None:
        parse_store_file(place.read(half), f"{place}/{half}")
        told = "half of a store, copied or removed"
    else:
        read_store_file(place)
        told = "a store"
    ours = {STORE_FILE, GROUP, MARKS}
    foreign = [name for name in place.children() if name not in ours and not is_temporary(name)]
    if foreign:
        raise UsageError(
            f"{place} also holds {foreign[0]!r}, which is no part of a store; move it away first"
        )
    return Leaving((place, *rests), told)


def remove(leaving: Leaving) -> None:
    """Delete for good. From the first moment on there is no store, whatever happens."""
    for place in leaving.places:
        place.delete_all(STORE_FILE if is_store(place) else _INCOMING, _REMOVED, MARKS)
