"""The parts of a store -> the same rows in parts of another size.

A store's part is one unit, or several: consecutive ones of its split; see mpcache.store.units.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.maintenance.copy import grow_alike
from mpcache.store.format import SEQUENCE, TOKENS, array_specs, committed_length
from mpcache.store.layout import Layout
from mpcache.store.mark import TokenProgress
from mpcache.store.part_encoder import values_digest
from mpcache.store.reader import Store
from mpcache.store.units import Units, join_progress, split_progress, unit_rows
from mpcache.store.writer import Writer


@dataclass(frozen=True)
class _Source:
    """Where one unit of a new part comes from."""

    place: int
    "of the unit in the new part"
    part: int
    index: int
    "of the unit in that part of the source"
    rows: int


class Repartition:
    """What the parts of a new layout are made of.

    Raises:
        ValueError: such parts cannot be made, or not yet.
    """

    def __init__(self, store: Store, layout: Layout, arrays: Sequence[str]) -> None:
        self.store, self.layout = store, layout
        self.is_same = store.part_rows == layout.part_rows
        size = store.part_rows if self.is_same else unit_rows(store.identity, store.layout)
        self.old, self.new = Units(store.layout, size), Units(layout, size)
        if not self.is_same and store.has_lone_documents:
            raise UsageError(
                "part_rows cannot change where each document was run alone: a part holds whole "
                "pieces of documents, so that its rows are fewer than part_rows and cannot be "
                f"joined to the next part's; keep part_rows {store.part_rows}, or collect with "
                f"--part-rows {layout.part_rows}"
            )
        if not self.is_same:
            self._refuse_gaps(arrays)

    def _refuse_gaps(self, arrays: Sequence[str]) -> None:
        planned = self.store.part_numbers(TOKENS)
        for array in arrays:
            if lacking := sorted(set(planned) - set(self.store.part_numbers(array))):
                raise UsageError(
                    f"part_rows can change once all parts are collected, {array} lacks part "
                    f"{lacking[0]}; collect it, or leave that hookpoint out"
                )

    def parts(self, array: str) -> tuple[int, ...]:
        """Numbers of the new parts."""
        there = self.store.part_numbers(array)
        if self.is_same:
            return there
        units = (
            unit for part in there for unit, _ in self.old.units_with_rows(part, self._rows(part))
        )
        return tuple(sorted({self.new.part_of(unit)[0] for unit in units}))

    def grow(self, array: str, writer: Writer) -> None:
        """Let an array of the new store span its parts."""
        if self.is_same:
            return grow_alike(self.store, array, writer)
        width = self.store.mark(self.store.part_numbers(array)[0], array).width
        return writer.grow(array, max(self.parts(array)) + 1, width)

    def is_copy(self, array: str) -> bool:
        """Whether new parts of an array are those of the source, byte for byte."""
        return self.is_same and array_specs(array, self.store.layout, 1) == array_specs(
            array, self.layout, 1
        )

    def values(self, part: int, array: str, which: int = 0) -> np.ndarray:
        """What a new part holds, as stored in the source.

        `which` counts the Zarr arrays that one mark commits.

        Raises DamagedStoreError where the source is not what was committed.
        """
        sources = list(self._sources(part))
        entries = self.store.ctx_len if array == TOKENS else 1  # rows of an entry
        made, whole, read, filled = np.empty(0), np.empty(0), -1, 0
        for source in sources:
            if source.part != read:  # several units of a part are read at once
                whole, read = self._checked(source.part, array, which), source.part
            start = source.index * self.old.unit_rows
            piece = whole[start // entries : -(-(start + source.rows) // entries)]
            if array == SEQUENCE:
                piece = self._renumbered(piece, part, source)
            if len(sources) == 1:
                return piece
            if not filled:
                rows = sum(one.rows for one in sources)
                made = np.empty((rows // entries, *piece.shape[1:]), piece.dtype)
            made[filled : filled + len(piece)] = piece
            filled += len(piece)
        return made

    def has_nonfinite(self, part: int, array: str) -> bool:
        """Whether what a new part is made of has values that are not finite."""
        marks = (self.store.mark(source.part, array) for source in self._sources(part))
        return any(mark.nonfinite for mark in marks)

    def progress(self, part: int) -> TokenProgress:
        """What the mark of a new part's tokens says of the documents."""
        units = [
            split_progress(self.store.index.token_progress(source.part))[source.index]
            for source in self._sources(part)
        ]
        return join_progress(units)

    def rows(self, part: int) -> int:
        """True rows of a new part."""
        return sum(source.rows for source in self._sources(part))

    def refuse_growth(self, part: int, array: str, writer: Writer) -> None:
        """Raise ValueError where a part that is there would have more rows by now."""
        if not self.is_same and writer.mark(part, array).rows != self.rows(part):
            raise UsageError(
                f"{writer.storage} ends with a part of fewer rows than its source has by now; "
                "convert into a new place"
            )

    def _rows(self, part: int) -> int:
        return self.store.mark(part, TOKENS).rows

    def _sources(self, part: int) -> Iterator[_Source]:
        """Where the units of a new part come from, as far as its split goes."""
        planned = set(self.store.part_numbers(TOKENS))
        for place, unit in enumerate(self.new.units_of(part)):
            old, index = self.old.part_of(unit)
            if old not in planned:
                return
            units = self.old.units_with_rows(old, self._rows(old))
            if index < len(units):
                yield _Source(place, old, index, units[index][1])

    def _checked(self, part: int, array: str, which: int) -> np.ndarray:
        mark = self.store.mark(part, array)
        spec = array_specs(array, self.store.layout, mark.width)[which]
        length = committed_length(spec, array, mark.rows, self.store.ctx_len)
        values = np.empty((length, *spec.part_shape[1:]), spec.dtype)
        for start, stop in spec.steps(length):  # at once it would take as much memory again
            values[start:stop] = self.store.reader.read_object(array, spec, part, start, stop)
        told = mark.objects[spec.object_path(part)]
        if values_digest([values]) != told.values_xxh3_128:
            raise DamagedStoreError(
                f"{self.store.storage}/{spec.object_path(part)} is damaged: it decodes to other "
                "values; mpcache repair mends it"
            )
        return values

    def _renumbered(self, sequence_R: np.ndarray, part: int, source: _Source) -> np.ndarray:
        """Sequences of a unit's rows, numbered as in the new store."""
        size = self.new.unit_sequences
        old = source.part * self.store.layout.part_sequences + source.index * size
        new = part * self.layout.part_sequences + source.place * size
        return (sequence_R.astype(np.int64) + (new - old)).astype(np.uint32)
