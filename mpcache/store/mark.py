"""Commit marks: what a mark says of one array's part, parsed, checked and written.

A new field goes into one of the dataclasses here, with None as its default because older marks lack
it, and its check goes below `_is_consistent`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mpcache.config import Split
from mpcache.errors import DamagedStoreError
from mpcache.store.object_paths import TOKENS, array_specs
from mpcache.store.part_layout import MAX_COUNT, Layout
from mpcache.store.sealed_json import json_round_trip, seal, unseal
from mpcache.untrusted_names import is_acts_array

Cursor = tuple[int, int]
"number of a document in the order of the seed, and its first token that is not yet stored"


@dataclass(frozen=True, kw_only=True)
class ObjectRecord:
    """Size and digests of an object as it was committed."""

    bytes: int
    xxh3_128: str
    "of the object's bytes, in hexadecimal"
    values_xxh3_128: str
    "of the decoded values: little-endian, C order, without padding"


@dataclass(frozen=True, kw_only=True)
class TokenProgress:
    """Which documents the tokens of a part come from. Fields that are None are not written."""

    cursor: Cursor
    "where the part starts"
    next_cursor: Cursor
    "where the next part of the split starts"
    last: bool
    "the dataset ends with this part"
    empty_documents: int | None = None
    "documents without tokens that were left out since the part before; None: they are kept"
    cursors: Sequence[Cursor] | None = None
    "where each unit starts, in a part of several units (mpcache.store.units_of_part)"
    empty_documents_of_units: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What was measured on the rows of one side of a hookpoint."""

    width: int
    finite_rows: int
    "rows that are finite throughout; moments are over these"
    largest: float
    "largest finite absolute value"
    nonfinite: int
    "values that are infinite or not a number"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What one mark commits. Fields that are None are not written."""

    array: str
    part: int
    rows: int
    "true rows; the rest of the part is padding"
    split: Split
    objects: Mapping[str, ObjectRecord]
    "by path in the store"
    fingerprint: str | None = None
    "of the store; older marks lack it"
    host: str | None = None
    time: str | None = None
    "when it was written, ISO 8601 in UTC"
    attempt: str | None = None
    "part of the temporary names of its objects"
    replaces: Mapping[str, Any] | None = None
    "what a repair has replaced, as JSON"
    progress: TokenProgress | None = None
    "in the mark of `tokens` alone"
    statistics: RowStatistics | None = None
    "in the mark of an `acts` array alone"
    other: Mapping[str, Any] = field(default_factory=dict)
    "fields that this version does not know, written back as they were"

    @property
    def width(self) -> int:
        """Dimensions of an `acts` array; 0 for other arrays."""
        return self.statistics.width if self.statistics else 0

    @property
    def nonfinite(self) -> int:
        """Values that are infinite or not a number; 0 for other arrays than `acts`."""
        return self.statistics.nonfinite if self.statistics else 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(record.bytes for record in self.objects.values())

    def as_json(self) -> dict[str, Any]:
        """The flat fields of the file, without its digest."""
        parts = (self.progress, self.statistics)
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NESTED}
        for part in parts:
            content |= {} if part is None else asdict(part)
        content["objects"] = {name: asdict(record) for name, record in self.objects.items()}
        known = {name: value for name, value in content.items() if value is not None}
        plain: dict[str, Any] = json_round_trip({**known, **self.other})
        return plain

    def sealed(self) -> bytes:
        """Bytes of the file."""
        return seal(self.as_json())


_NESTED = {"progress", "statistics", "other"}
_OWN = {f.name for f in fields(Mark)} - _NESTED
_PROGRESS = {f.name for f in fields(TokenProgress)}
_STATISTICS = {f.name for f in fields(RowStatistics)}


def parse_mark(
    data: bytes, part: int, array: str, layout: Layout, fingerprint: str, file: str
) -> Mark:
    """The mark that a file holds. The digest of a mark tells only that the mark is whole.

    Raises DamagedStoreError where the mark is damaged, or of another part or store.
    """
    content = unseal(data, file)
    named = (content.get("part"), content.get("array"), content.get("split"))
    if named != (part, array, layout.split_of(part)):
        raise DamagedStoreError(
            f"{file} is damaged: it must describe part {part} of {array}, but describes another "
            "part or array"
        )
    if content.get("fingerprint", fingerprint) != fingerprint:
        raise DamagedStoreError(f"{file} is damaged: it belongs to another store")
    try:
        is_valid = _is_consistent(content, part, array, layout)
    except (KeyError, TypeError, AttributeError, OverflowError):
        is_valid = False
    if not is_valid:
        raise DamagedStoreError(f"{file} is damaged: its fields contradict each other")
    return _from_json(content)


def _from_json(content: dict[str, Any]) -> Mark:
    nested = _PROGRESS if content["array"] == TOKENS else set()
    nested = _STATISTICS if is_acts_array(content["array"]) else nested
    own = {name: value for name, value in content.items() if name in _OWN}
    inner = {name: value for name, value in content.items() if name in nested}
    records = {name: ObjectRecord(**record) for name, record in content["objects"].items()}
    return Mark(
        **{**own, "objects": records},
        progress=_progress(inner) if nested is _PROGRESS else None,
        statistics=RowStatistics(**inner) if nested is _STATISTICS else None,
        other={name: content[name] for name in content if name not in _OWN | nested},
    )


def _progress(inner: Mapping[str, Any]) -> TokenProgress:
    cursors = inner.get("cursors")
    return TokenProgress(
        **{
            **inner,
            "cursor": tuple(inner["cursor"]),
            "next_cursor": tuple(inner["next_cursor"]),
            "cursors": None if cursors is None else [tuple(cursor) for cursor in cursors],
        }
    )


def _is_consistent(content: Mapping[str, Any], part: int, array: str, layout: Layout) -> bool:
    """Whether the fields are those that a writer can have written. Raises for missing fields."""
    if not _is_count(content["rows"], 1, layout.part_rows):
        return False
    if array == TOKENS and not _is_progress(content, layout):
        return False
    if is_acts_array(array) and not _is_statistics(content):
        return False
    names = {spec.object_path(part) for spec in array_specs(array, layout, content.get("width", 0))}
    records = content["objects"]
    return records.keys() == names and all(map(_is_record, records.values()))


def _is_count(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_progress(content: Mapping[str, Any], layout: Layout) -> bool:
    cursors = [content["cursor"], content["next_cursor"], *content.get("cursors", ())]
    return (
        (layout.token_flags or content["rows"] % layout.ctx_len == 0)
        and type(content["last"]) is bool
        and all(len(c) == 2 and all(type(n) is int and n >= 0 for n in c) for c in cursors)
    )


def _is_statistics(content: Mapping[str, Any]) -> bool:
    return (
        _is_count(content["width"], 1, MAX_COUNT)
        and _is_count(content["finite_rows"], 0, content["rows"])
        and _is_count(content["nonfinite"], 0, MAX_COUNT * MAX_COUNT)
        and 0 <= content["largest"] < math.inf
    )


def _is_record(record: Mapping[str, Any]) -> bool:
    digests = (record["xxh3_128"], record["values_xxh3_128"])
    return (
        record.keys() == {f.name for f in fields(ObjectRecord)}
        and type(record["bytes"]) is int
        and record["bytes"] > 0
        and all(type(d) is str and re.fullmatch("[0-9a-f]{32}", d) for d in digests)
    )
