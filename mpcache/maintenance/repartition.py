"""Read the parts of a new layout from a store of another part size."""

from collections.abc import Sequence

import numpy as np

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.maintenance.copy import grow_like_source
from mpcache.maintenance.part_map import PartMap
from mpcache.store.digests import values_digest
from mpcache.store.object_paths import SEQUENCE, TOKENS, array_specs, committed_length
from mpcache.store.part_layout import Layout
from mpcache.store.reader import Store
from mpcache.store.writer import Writer


class Repartition:
    """The content of the parts of a new layout.

    Raises:
        UsageError: parts of this size cannot be made of the store's rows, or not yet.
    """

    def __init__(self, store: Store, layout: Layout, arrays: Sequence[str]) -> None:
        self.store, self.layout = store, layout
        self.map = PartMap(store, layout, arrays)

    def grow(self, array: str, writer: Writer) -> None:
        """Let an array of the new store span its parts."""
        if self.map.keeps_parts:
            return grow_like_source(self.store, array, writer)
        width = self.store.mark(self.store.part_numbers(array)[0], array).width
        return writer.grow(array, max(self.map.parts(array)) + 1, width)

    def is_copy(self, array: str) -> bool:
        """Whether the new parts of an array are those of the source, byte for byte."""
        old, new = (array_specs(array, layout, 1) for layout in (self.store.layout, self.layout))
        return self.map.keeps_parts and old == new

    def values(self, part: int, array: str, which: int = 0) -> np.ndarray:
        """The values of a new part, in the dtype of the source.

        `which` is the index of the Zarr array among those that one mark commits.

        Raises:
            DamagedStoreError: the source is not what was committed.
        """
        sources = list(self.map.sources(part))
        rows_per_entry = self.store.ctx_len if array == TOKENS else 1
        joined, whole, read, filled = np.empty(0), np.empty(0), -1, 0
        for source in sources:
            if source.part != read:  # all units of a part of the source are read at once
                whole, read = self._read_checked(source.part, array, which), source.part
            start = source.index * self.map.old_units.unit_rows
            piece = whole[start // rows_per_entry : -(-(start + source.rows) // rows_per_entry)]
            if array == SEQUENCE:
                shift = self.map.sequence_shift(part, source)
                piece = (piece.astype(np.int64) + shift).astype(np.uint32)
            if len(sources) == 1:
                return piece
            if not filled:
                entries = self.map.rows(part) // rows_per_entry
                joined = np.empty((entries, *piece.shape[1:]), piece.dtype)
            joined[filled : filled + len(piece)] = piece
            filled += len(piece)
        return joined

    def has_nonfinite(self, part: int, array: str) -> bool:
        """Whether a part of the source that goes into a new part has values that are not finite."""
        marks = (self.store.mark(source.part, array) for source in self.map.sources(part))
        return any(mark.nonfinite for mark in marks)

    def check_not_grown(self, part: int, array: str, writer: Writer) -> None:
        """Raise UsageError if a committed new part would have more rows by now."""
        if not self.map.keeps_parts and writer.mark(part, array).rows != self.map.rows(part):
            raise UsageError(
                f"the last part of {writer.storage} was converted before the source had all rows "
                "of that part; convert into a new folder"
            )

    def _read_checked(self, part: int, array: str, which: int) -> np.ndarray:
        """The values of a whole part of the source, compared with the digest in its mark."""
        mark = self.store.mark(part, array)
        spec = array_specs(array, self.store.layout, mark.width)[which]
        length = committed_length(spec, array, mark.rows, self.store.ctx_len)
        values = np.empty((length, *spec.part_shape[1:]), spec.dtype)
        for start, stop in spec.steps(length):  # all at once would take the same memory again
            values[start:stop] = self.store.reader.read_object(array, spec, part, start, stop)
        record = mark.objects[spec.object_path(part)]
        if values_digest([values]) != record.values_xxh3_128:
            raise DamagedStoreError(
                f"{self.store.storage}/{spec.object_path(part)} is damaged: its values differ "
                f"from those that were collected"
            )
        return values
