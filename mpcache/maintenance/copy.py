"""Copy a store, byte for byte."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash
from tqdm import tqdm

from mpcache.errors import DamagedStoreError
from mpcache.maintenance.incoming_store import begin_store, check_not_nested, finish_store
from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map
from mpcache.storage.base import Storage, open_storage
from mpcache.store.array_metadata import check_metadata
from mpcache.store.mark import ObjectRecord
from mpcache.store.object_paths import STORE_FILE, array_specs, mark_path
from mpcache.store.reader import Store, open_store
from mpcache.store.writer import Writer


@dataclass(frozen=True, kw_only=True)
class CopySummary:
    """What a copy or a conversion did."""

    store: str
    "path or URL of the new store"
    parts: int
    "parts of arrays that the new store holds, each with its mark"
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
) -> CopySummary:
    """Copy what a store has committed, and compare each object with its mark on the way.

    The same call continues an interrupted copy, and later adds what the source got since. Memory
    for each part in work at the same time: a megabyte; 64 MiB if the source is a bucket; the object
    itself if the target is a bucket.

    Args:
        source: Path or URL of the store.
        target: Path or URL of the new store.
        parallel: Threads and processes that copy parts.
        quiet: Without a progress bar.

    Raises:
        UsageError: `source` is no store, or `target` holds something else. Nothing was written.
        DamagedStoreError: An object of the source is not what was committed.

    Example:
        ```python
        from mpcache import copy

        summary = copy("store", "store-copy")
        print(summary.written, "of", summary.parts, "parts copied,", summary.bytes, "bytes")
        ```
    """
    store, to = open_store(source), open_storage(target)
    store_file = store.storage.read(STORE_FILE)
    check_not_nested(store.storage, to)
    widths = [store.width(name, side) for name in store.hookpoints for side in store.sides(name)]
    begin_store(to, store_file, store.layout, widths)
    writer = Writer(to, store.layout, store.fingerprint)
    marks = [(part, array) for array in store.arrays for part in store.part_numbers(array)]
    for array in store.arrays:
        grow_like_source(store, array, writer)
    sizes = ordered_map(functools.partial(copy_part, store, writer), marks, parallel, quiet=quiet)
    written = list(tqdm(sizes, "copy", len(marks), unit="mark", disable=quiet))
    finish_store(to, store_file)
    return CopySummary(
        store=str(to), parts=len(marks), written=sum(size > 0 for size in written),
        bytes=sum(written),
    )  # fmt: skip


def grow_like_source(store: Store, array: str, writer: Writer) -> None:
    """Let an array of the new store span as many parts as in its source."""
    width = store.mark(store.part_numbers(array)[0], array).width
    spec = array_specs(array, store.layout, width)[0]
    writer.grow(array, check_metadata(store.storage, spec), width)


def copy_part(store: Store, writer: Writer, task: tuple[int, str]) -> int:
    """Copy the objects of one mark, given by part and array, and then the mark.

    Returns the bytes written: 0 if the mark was there already.
    """
    part, array = task
    mark = store.mark(part, array)
    sources = {name: _checked_pieces(store.storage, name, r) for name, r in mark.objects.items()}
    data = store.storage.read(mark_path(part, array))
    is_new = writer.adopt(part, array, data, sources)
    return mark.stored_bytes if is_new else 0


def _checked_pieces(storage: Storage, name: str, record: ObjectRecord) -> Iterator[bytes]:
    """The bytes of an object. Raises at their end if they are not those that its mark records."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        for piece in storage.read_pieces(name):
            digest.update(piece)
            size += len(piece)
            yield piece
    except FileNotFoundError:
        raise DamagedStoreError(
            f"{storage}/{name} is missing, but the store records it as written"
        ) from None
    if (size, digest.hexdigest()) != (record.bytes, record.xxh3_128):
        raise DamagedStoreError(
            f"{storage}/{name} is damaged: its bytes differ from those that were written"
        )
