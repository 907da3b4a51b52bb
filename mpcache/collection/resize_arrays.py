"""How many parts the Zarr metadata of a store's arrays span: the same number for all arrays.

Zarr's metadata only ever grows. Readers take the extent from the marks, and other Zarr readers from
the metadata.
"""

from collections.abc import Mapping

from mpcache.store.array_metadata import check_metadata
from mpcache.store.object_paths import POSITION, SEQUENCE, TOKENS, array_specs, hookpoint_of
from mpcache.store.reader import Store, open_store
from mpcache.store.writer import Writer


def grow_arrays(
    writer: Writer, store: Store | None, new_widths: Mapping[str, int], parts: int
) -> None:
    """Let all arrays span `parts` parts, also arrays that this collection does not fill.

    All arrays grow at once and before any work, so that a stopped extension leaves no array behind.
    `new_widths` has the width of each array of activations that this collection fills.
    """
    span, widths = 0, {TOKENS: 0, SEQUENCE: 0, POSITION: 0}
    if store and store.part_numbers(TOKENS):
        span = check_metadata(writer.storage, array_specs(TOKENS, writer.layout)[0])
        acts = [array for array in store.arrays if array.startswith("acts/")]
        widths |= {array: _width(store, array) for array in acts}
    widths |= new_widths
    for array, width in widths.items():
        writer.grow(array, max(span, parts), width)


def equalize_spans(writer: Writer) -> None:
    """Let all arrays span the same parts again, after a collection.

    Another collection may have grown the arrays that it saw when it began, not those that this
    collection created since. And when two collections grow the same array at the same time, the
    smaller span may be written last.
    """
    while True:
        store = open_store(writer.storage)
        widths = {array: _width(store, array) for array in store.arrays}
        spans = {array: _span(writer, array, width) for array, width in widths.items()}
        longest = max(most for _, most in spans.values())
        short = [array for array, (fewest, _) in spans.items() if fewest < longest]
        for array in short:
            writer.grow(array, longest, widths[array])
        if not short:
            return


def _width(store: Store, array: str) -> int:
    return store.width(*hookpoint_of(array)) if array.startswith("acts/") else 0


def _span(writer: Writer, array: str, width: int) -> tuple[int, int]:
    """Fewest and most parts that the Zarr arrays under one mark span."""
    specs = array_specs(array, writer.layout, width)
    parts = [check_metadata(writer.storage, spec) for spec in specs]
    return min(parts), max(parts)
