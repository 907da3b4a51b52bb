"""How many rows a store was asked for, and whether its dataset has as many."""

from dataclasses import dataclass

from mpcache.format import POSITION, SEQUENCE, TOKENS, check_metadata, specs
from mpcache.guard import DamagedStoreError
from mpcache.reader import Store
from mpcache.tokens import FIRST_PARTS, following


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Rows wanted and rows that there can be, whatever of them is collected yet."""

    rows_wanted: int
    "rows asked for; of an extended store the most that were, in whole parts"
    parts_wanted: int
    rows_planned: int
    "rows of the wanted parts whose tokens are committed"
    is_planned: bool
    "all wanted parts that the dataset has are committed as tokens"
    exhausted: bool
    "the dataset ended before the rows wanted"

    def share(self, rows: float, part_rows: int) -> float:
        """So many collected rows as a share of the rows wanted, 1 at most."""
        if self.exhausted:
            return rows / self.rows_wanted
        if self.is_planned:  # rows wanted are rounded up to whole parts
            return rows / max(1, self.rows_planned)
        return rows / max(self.parts_wanted * part_rows, self.rows_planned)


def wanted_parts(rows: int, part_rows: int) -> int:
    """Parts that hold so many rows; each of the two splits has one, whatever is asked for."""
    return max(len(FIRST_PARTS), -(-rows // part_rows))


def extent_of(store: Store, rows: int | None = None) -> Extent:
    """Of a collection of so many rows; None: of the largest that the store was asked for."""
    asked = _most_asked(store) if rows is None else rows
    parts = wanted_parts(asked, store.part_rows)
    planned = [part for part in store.numbers(TOKENS) if part < parts]
    rows_planned = sum(int(mark["rows"]) for mark in store.marks(TOKENS, planned))
    is_planned = _is_planned(store, parts)
    has_ended = any(store.mark(part, TOKENS)["last"] for part in planned)
    return Extent(
        rows_wanted=asked,
        parts_wanted=parts,
        rows_planned=rows_planned,
        is_planned=is_planned,
        exhausted=is_planned and has_ended and rows_planned < asked,
    )


def _most_asked(store: Store) -> int:
    """Of the first collection from its config; of later ones from how far arrays were made."""
    found = store.config.get("rows")
    first = found if type(found) is int and found > 0 else 0
    parts = wanted_parts(first, store.part_rows)
    try:
        span = check_metadata(store.place, specs(TOKENS, store.layout)[0])
    except DamagedStoreError:
        span = 0  # for verify to say
    return first if span <= parts and first else max(span, parts) * store.part_rows


def _is_planned(store: Store, parts: int) -> bool:
    there = set.intersection(*(set(store.numbers(a)) for a in (TOKENS, SEQUENCE, POSITION)))
    return all(_ends(store, there, part, parts) for part in FIRST_PARTS)


def _ends(store: Store, there: set[int], part: int, parts: int) -> bool:
    while part < parts:
        if part not in there:
            return False
        if store.mark(part, TOKENS)["last"]:
            return True
        part = following(part, store.layout.validation_every)
    return True
