"""Parts that hold several parts of a collection: what `convert --part-rows` makes.

Rows are permuted inside the part that they were collected in: a unit, of as many rows as the
store's identity says. A store's part is one unit, or consecutive units of one split in their order,
so that it always has the tokens of its rows. Parts and units are numbered by the same rule: every
n-th number is validation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpcache.config import Split, split_of
from mpcache.errors import DamagedStoreError, UsageError
from mpcache.store.mark import TokenProgress
from mpcache.store.part_layout import Layout


def unit_rows(identity: Mapping[str, Any], layout: Layout) -> int:
    """Rows in a unit of a store."""
    rows = identity.get("part_rows")
    if type(rows) is not int or rows < 1 or layout.part_rows % rows:
        raise DamagedStoreError(
            "store.json is damaged: part_rows must be a multiple of the part_rows of the "
            f"collection, got {layout.part_rows} and {rows!r}"
        )
    return rows


@dataclass(frozen=True)
class Units:
    """How the parts of a store are made of units."""

    layout: Layout
    unit_rows: int

    def __post_init__(self) -> None:
        if self.layout.part_rows % self.unit_rows:
            raise UsageError(
                f"part_rows must be a multiple of {self.unit_rows}, the part_rows of the "
                f"collection, got {self.layout.part_rows}; use a multiple, or collect again with "
                f"--part-rows {self.layout.part_rows}"
            )

    @property
    def count(self) -> int:
        """Units in a part."""
        return self.layout.part_rows // self.unit_rows

    @property
    def unit_sequences(self) -> int:
        return self.unit_rows // self.layout.ctx_len

    def units_of(self, part: int) -> tuple[int, ...]:
        """Numbers of the units of a whole part."""
        split, index = _index_in_split(part, self.layout.validation_every)
        first = index * self.count
        every = self.layout.validation_every
        return tuple(_number_of(split, first + i, every) for i in range(self.count))

    def part_of(self, unit: int) -> tuple[int, int]:
        """The part that holds a unit, and the unit's index in the part."""
        split, index = _index_in_split(unit, self.layout.validation_every)
        part, unit_of_part = divmod(index, self.count)
        return _number_of(split, part, self.layout.validation_every), unit_of_part

    def previous_part(self, part: int) -> int | None:
        """The part before this one in its split; None before the first."""
        split, index = _index_in_split(part, self.layout.validation_every)
        return _number_of(split, index - 1, self.layout.validation_every) if index else None

    def units_with_rows(self, part: int, rows: int) -> tuple[tuple[int, int], ...]:
        """The units of a part of `rows` rows, with the rows of each: the last may be shorter."""
        starts = range(0, rows, self.unit_rows)
        return tuple(
            (unit, min(self.unit_rows, rows - start))
            for unit, start in zip(self.units_of(part), starts, strict=False)
        )


def join_progress(units: Sequence[TokenProgress]) -> TokenProgress:
    """Progress of a part, from the progress of its units."""
    counts = [u.empty_documents for u in units if u.empty_documents is not None]
    is_joined = len(units) > 1
    return TokenProgress(
        cursor=units[0].cursor,
        next_cursor=units[-1].next_cursor,
        last=units[-1].last,
        empty_documents=sum(counts) if counts else None,
        cursors=[unit.cursor for unit in units] if is_joined else None,
        empty_documents_of_units=counts if is_joined and counts else None,
    )


def split_progress(part: TokenProgress) -> list[TokenProgress]:
    """Progress of each unit of a part, the inverse of `join_progress`."""
    starts = part.cursors or [part.cursor]
    ends = [*starts[1:], part.next_cursor]
    counts: Sequence[int | None] = part.empty_documents_of_units or [part.empty_documents]
    if part.empty_documents is None:
        counts = [None] * len(starts)
    return [
        TokenProgress(
            cursor=start,
            next_cursor=end,
            last=part.last and index == len(starts) - 1,
            empty_documents=count,
        )
        for index, (start, end, count) in enumerate(zip(starts, ends, counts, strict=True))
    ]


def _index_in_split(number: int, every: int) -> tuple[Split, int]:
    """The split of a number, and its index among the numbers of that split."""
    split = split_of(number, every)
    if split == "validation":
        return split, (number - 1) // every
    return split, number - (number - 2) // every - 1 if every > 1 and number > 1 else number


def _number_of(split: Split, index: int, every: int) -> int:
    """The number at an index of a split."""
    if split == "validation":
        return 1 + index * every
    if every == 1:  # nothing is validation
        return index
    period, rest = divmod(index, every - 1)
    return period * every + rest + (rest > 0)
