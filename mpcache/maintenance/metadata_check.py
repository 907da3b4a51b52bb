"""Check the Zarr metadata of a store against what its layout implies."""

import contextlib
from collections.abc import Iterator, Mapping

from mpcache.errors import DamagedStoreError
from mpcache.maintenance.findings import Finding
from mpcache.maintenance.mark_check import linked_or
from mpcache.storage.base import Storage
from mpcache.store.array_metadata import check_metadata
from mpcache.store.array_spec import ArraySpec
from mpcache.store.object_paths import array_specs
from mpcache.store.reader import Store


def check_all_metadata(store: Store) -> Iterator[Finding]:
    """Faults of `zarr.json` files. All arrays of a store span the same number of parts."""
    implied: dict[str, bytes] = {}
    for _, spec in all_specs(store):
        try:
            check_metadata(store.storage, spec)
        except DamagedStoreError as error:
            fault = linked_or("metadata", store.storage, spec.metadata_path)
            yield Finding(fault, spec.metadata_path, str(error))
        implied |= {n: data for n, data in spec.metadata(1).items() if n != spec.metadata_path}
    for name, data in implied.items():
        yield from _check_group(store.storage, name, data)
    spans = array_spans(store)
    usual = usual_span(spans)
    for name, span in spans.items():
        if span != usual:
            yield Finding(
                "metadata",
                name,
                f"describes {span} parts, but most arrays of the store describe {usual}",
            )


def array_spans(store: Store) -> dict[str, int]:
    """How many parts each `zarr.json` spans, without the damaged ones."""
    spans = {}
    for _, spec in all_specs(store):
        with contextlib.suppress(DamagedStoreError):
            spans[spec.metadata_path] = check_metadata(store.storage, spec)
    return spans


def usual_span(spans: Mapping[str, int]) -> int:
    """The span of most arrays."""
    return max(spans.values(), key=list(spans.values()).count, default=0)


def all_specs(store: Store) -> Iterator[tuple[str, ArraySpec]]:
    """The Zarr arrays that a store has by its marks, each with the array's name in marks."""
    for array in store.arrays:
        widths = (_width(store, part, array) for part in store.part_numbers(array))
        width = next((width for width in widths if width is not None), None)
        if width is not None:  # else all marks of the array are damaged
            yield from ((array, spec) for spec in array_specs(array, store.layout, width))


def _width(store: Store, part: int, array: str) -> int | None:
    try:
        return store.mark(part, array).width
    except DamagedStoreError:
        return None


def _check_group(storage: Storage, name: str, implied: bytes) -> Iterator[Finding]:
    try:
        stored = None if storage.size(name) is None else storage.read(name)
    except DamagedStoreError as error:
        yield Finding("linked", name, str(error))
        return
    if stored is None:
        yield Finding("metadata", name, "metadata of the Zarr group is missing")
    elif stored != implied:
        yield Finding(
            "metadata", name, "metadata of the Zarr group differs from what mpcache writes"
        )
