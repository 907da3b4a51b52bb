"""Read a part of an array as its mark commits it: true rows only, each object checked."""

import numpy as np

from mpcache.store.array_spec import ArraySpec
from mpcache.store.mark import ObjectRecord
from mpcache.store.mark_index import MarkIndex
from mpcache.store.object_paths import array_specs, committed_length
from mpcache.store.object_reader import ObjectReader


class PartReader:
    """Finds what a mark says of an object, and reads the object. Threads may share it."""

    def __init__(self, index: MarkIndex, objects: ObjectReader) -> None:
        self.index = index
        self.layout = index.layout
        self.objects = objects

    def read_part(self, array: str, part: int) -> dict[str, np.ndarray]:
        """All that one mark commits, as stored (bfloat16 as its 16 bits), by array name."""
        mark = self.index.mark(part, array)
        values = {}
        for spec in array_specs(array, self.layout, mark.width):
            length = committed_length(spec, array, mark.rows, self.layout.ctx_len)
            values[spec.name] = self.read_object(array, spec, part, 0, length)
        return values

    def read_rows(
        self, array: str, part: int, chunk: int | None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows of one chunk of a part, or of the whole part, as stored."""
        spec = array_specs(array, self.layout, self.index.mark(part, array).width)[0]
        return self.read_object(array, spec, part, *self.row_range(array, part, chunk), out)

    def row_range(self, array: str, part: int, chunk: int | None) -> tuple[int, int]:
        """First row of a chunk in its part, and the row after its last; of all rows for None."""
        rows = self.index.mark(part, array).rows
        if chunk is None:
            return 0, rows
        start = chunk * self.layout.chunk_rows
        return start, min(start + self.layout.chunk_rows, rows)

    def read_object(
        self,
        array: str,
        spec: ArraySpec,
        part: int,
        start: int,
        stop: int,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Entries `start` to `stop` of one part of one Zarr array, into `out` if it is given.

        `out` has the array's dtype and the shape of the result. Raises DamagedStoreError where the
        bytes are not those that were committed.
        """
        return self.objects.read(spec, part, self.record(array, spec, part), start, stop, out)

    def record(self, array: str, spec: ArraySpec, part: int) -> ObjectRecord:
        """What the mark says of an object."""
        return self.index.mark(part, array).objects[spec.object_path(part)]
