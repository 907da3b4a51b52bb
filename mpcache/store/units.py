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
from mpcache.errors import DamagedStoreError
from mpcache.store.format import Layout


def unit_rows(identity: Mapping[str, Any], layout: Layout) -> int:
    """Rows in a unit of a store."""
    found = identity.get("part_rows")
    if type(found) is not int or found < 1 or layout.part_rows % found:
        raise DamagedStoreError(
            f"store.json is damaged: parts of {layout.part_rows} rows cannot be made of parts "
            f"of {found!r}"
        )
    return found


@dataclass(frozen=True)
class Units:
    """How the parts of a store are made of units."""

    layout: Layout
    unit_rows: int

    def __post_init__(self) -> None:
        if self.layout.part_rows % self.unit_rows:
            raise ValueError(
                f"part_rows must be a multiple of {self.unit_rows}, the rows that were permuted "
                f"together with their tokens, got {self.layout.part_rows}; use a multiple, or "
                "collect anew with other part_rows"
            )

    @property
    def count(self) -> int:
        """Units in a part."""
        return self.layout.part_rows // self.unit_rows

    @property
    def unit_sequences(self) -> int:
        return self.unit_rows // self.layout.ctx_len

    def units_of(self, part: int) -> tuple[int, ...]:
        """Numbers of the units that a part holds, as far as the split goes."""
        split, place = _placed(part, self.layout.validation_every)
        first = place * self.count
        every = self.layout.validation_every
        return tuple(_numbered(split, first + one, every) for one in range(self.count))

    def part_of(self, unit: int) -> tuple[int, int]:
        """The part that holds a unit, and which of the part's units it is."""
        split, place = _placed(unit, self.layout.validation_every)
        part, index = divmod(place, self.count)
        return _numbered(split, part, self.layout.validation_every), index

    def previous_part(self, part: int) -> int | None:
        """The part before this one in its split; None before the first."""
        split, place = _placed(part, self.layout.validation_every)
        return _numbered(split, place - 1, self.layout.validation_every) if place else None

    def units_with_rows(self, part: int, rows: int) -> tuple[tuple[int, int], ...]:
        """The units of a part of so many rows, with the rows of each: the last may be short."""
        starts = range(0, rows, self.unit_rows)
        return tuple(
            (unit, min(self.unit_rows, rows - start))
            for unit, start in zip(self.units_of(part), starts, strict=False)
        )


def join_progress(units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the mark of a part's tokens says of the documents, given what each unit's would say."""
    first, last = units[0], units[-1]
    whole = {key: last[key] for key in ("next_cursor", "last")} | {"cursor": first["cursor"]}
    empty = [unit["empty_documents"] for unit in units if "empty_documents" in unit]
    if empty:
        whole["empty_documents"] = sum(empty)
    if len(units) > 1:
        whole["cursors"] = [unit["cursor"] for unit in units]
        whole |= {"empty_documents_of_units": empty} if empty else {}
    return whole


def split_progress(mark: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the marks of a part's units would say, the inverse of `join_progress`."""
    starts = mark.get("cursors", [mark["cursor"]])
    ends = [*starts[1:], mark["next_cursor"]]
    units = [
        {"cursor": start, "next_cursor": end, "last": False}
        for start, end in zip(starts, ends, strict=True)
    ]
    units[-1]["last"] = mark["last"]
    if "empty_documents" in mark:
        counts = mark.get("empty_documents_of_units", [mark["empty_documents"]])
        for unit, count in zip(units, counts, strict=True):
            unit["empty_documents"] = count
    return units


def _placed(number: int, every: int) -> tuple[Split, int]:
    """The split of a number, and its place among the numbers of that split."""
    split = split_of(number, every)
    if split == "validation":
        return split, (number - 1) // every
    return split, number - (number - 2) // every - 1 if every > 1 and number > 1 else number


def _numbered(split: Split, place: int, every: int) -> int:
    """The number at a place of a split."""
    if split == "validation":
        return 1 + place * every
    if every == 1:  # nothing is validation
        return place
    period, rest = divmod(place, every - 1)
    return period * every + rest + (rest > 0)
