"""How many rows a store was asked for, and whether its dataset has as many."""

from dataclasses import dataclass

from mpcache.errors import DamagedStoreError
from mpcache.store.array_metadata import check_metadata
from mpcache.store.object_paths import TOKENS, array_specs
from mpcache.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Rows wanted and rows that there can be, whether or not they are collected yet."""

    rows_wanted: int
    "rows asked for; of an extended store the most that were, in whole parts"
    parts_wanted: int
    rows_planned: int
    "rows of the wanted parts whose tokens are committed"
    is_planned: bool
    "all wanted parts that the dataset has are committed as tokens"
    exhausted: bool
    "the dataset ended before the rows wanted"

    @property
    def shortfall(self) -> str | None:
        """Both numbers and the reason, where there will be fewer rows than were wanted."""
        if not self.is_planned or self.rows_planned >= self.rows_wanted:
            return None
        reason = "the dataset ended" if self.exhausted else "parts end where documents do"
        return f"{self.rows_planned:,} rows of {self.rows_wanted:,} wanted: {reason}"

    def share(self, rows: float, part_rows: int) -> float:
        """Collected rows as a share of the rows wanted, at most 1."""
        if self.shortfall:
            return rows / self.rows_wanted
        if self.is_planned:  # rows wanted are rounded up to whole parts
            return rows / max(1, self.rows_planned)
        return rows / max(self.parts_wanted * part_rows, self.rows_planned)


def extent_of(store: Store, rows: int | None = None) -> Extent:
    """Extent of a collection of `rows` rows; None: of the largest collection so far."""
    asked = _most_asked(store) if rows is None else rows
    parts = store.layout.parts_for(asked)
    planned = [part for part in store.part_numbers(TOKENS) if part < parts]
    rows_planned = sum(mark.rows for mark in store.marks(TOKENS, planned))
    is_planned = store.index.has_planned(parts)
    has_ended = any(store.index.token_progress(part).last for part in planned)
    return Extent(
        rows_wanted=asked,
        parts_wanted=parts,
        rows_planned=rows_planned,
        is_planned=is_planned,
        exhausted=is_planned and has_ended and rows_planned < asked,
    )


def _most_asked(store: Store) -> int:
    """Rows of the largest collection: the config has the first one, later ones grew the arrays."""
    rows = store.config.get("rows")
    first = rows if type(rows) is int and rows > 0 else 0
    parts = store.layout.parts_for(first)
    try:
        span = check_metadata(store.storage, array_specs(TOKENS, store.layout)[0])
    except DamagedStoreError:
        span = 0  # mpcache verify reports it
    return first if span <= parts and first else max(span, parts) * store.part_rows
