"""Which rows of a store make up the parts of another part size.

A part is one unit or several consecutive units of its split; see `mpcache.store.units_of_part`.
Nothing here reads arrays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpcache.errors import UsageError
from mpcache.store.mark import TokenProgress
from mpcache.store.object_paths import TOKENS
from mpcache.store.part_layout import Layout
from mpcache.store.reader import Store
from mpcache.store.units_of_part import Units, join_progress, split_progress, unit_rows


@dataclass(frozen=True)
class UnitSource:
    """Where a unit of a new part comes from."""

    new_index: int
    "of the unit in the new part"
    part: int
    "of the source"
    index: int
    "of the unit in that part of the source"
    rows: int


class PartMap:
    """The parts of a new layout -> the units of a store that they are made of.

    Raises:
        UsageError: parts of this size cannot be made of the store's rows, or not yet.
    """

    def __init__(self, store: Store, layout: Layout, arrays: Sequence[str]) -> None:
        self.store, self.layout = store, layout
        self.keeps_parts = store.part_rows == layout.part_rows
        size = store.part_rows if self.keeps_parts else unit_rows(store.identity, store.layout)
        self.old_units, self.new_units = Units(store.layout, size), Units(layout, size)
        if not self.keeps_parts:
            self._check_can_change(arrays)

    def parts(self, array: str) -> tuple[int, ...]:
        """Numbers of the new parts of an array."""
        old_parts = self.store.part_numbers(array)
        if self.keeps_parts:
            return old_parts
        units = (
            unit
            for part in old_parts
            for unit, _ in self.old_units.units_with_rows(part, self._old_rows(part))
        )
        return tuple(sorted({self.new_units.part_of(unit)[0] for unit in units}))

    def sources(self, part: int) -> Iterator[UnitSource]:
        """Where the units of a new part come from, as far as the part's split goes."""
        committed = set(self.store.part_numbers(TOKENS))
        for new_index, unit in enumerate(self.new_units.units_of(part)):
            old_part, index = self.old_units.part_of(unit)
            if old_part not in committed:
                return
            units = self.old_units.units_with_rows(old_part, self._old_rows(old_part))
            if index < len(units):
                yield UnitSource(new_index, old_part, index, units[index][1])

    def rows(self, part: int) -> int:
        """True rows of a new part."""
        return sum(source.rows for source in self.sources(part))

    def progress(self, part: int) -> TokenProgress:
        """What the mark of a new part's tokens records of the documents."""
        return join_progress(
            [
                split_progress(self.store.index.token_progress(source.part))[source.index]
                for source in self.sources(part)
            ]
        )

    def sequence_shift(self, part: int, source: UnitSource) -> int:
        """Number of a unit's first sequence in the new store, minus its number in the source."""
        size = self.new_units.unit_sequences
        old = source.part * self.store.layout.part_sequences + source.index * size
        return part * self.layout.part_sequences + source.new_index * size - old

    def _old_rows(self, part: int) -> int:
        return self.store.mark(part, TOKENS).rows

    def _check_can_change(self, arrays: Sequence[str]) -> None:
        if self.store.has_lone_documents:
            raise UsageError(
                "part_rows cannot change in a store that was collected with "
                "--one-document-per-sequence, because its parts cannot be joined; keep "
                f"part_rows={self.store.part_rows}, or collect again with --part-rows "
                f"{self.layout.part_rows}"
            )
        committed = set(self.store.part_numbers(TOKENS))
        for array in arrays:
            if missing := sorted(committed - set(self.store.part_numbers(array))):
                raise UsageError(
                    f"part {missing[0]} of {array} is not collected yet, but part_rows can change "
                    "only after all parts are collected; run mpcache collect to its end, or remove "
                    "the hookpoint from --hookpoints"
                )
