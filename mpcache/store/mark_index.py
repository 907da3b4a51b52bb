"""Which parts of which arrays a store has, by the names of its commit marks alone."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from mpcache.storage.base import Storage
from mpcache.store.format import MARKS, parse_mark_path


def committed_parts(place: Storage) -> dict[str, set[int]]:
    """The committed parts of each array, arrays in natural order."""
    parts: dict[str, set[int]] = {}
    for part, array in committed_marks(place):
        parts.setdefault(array, set()).add(part)
    return {array: parts[array] for array in sorted(parts, key=_natural)}


def committed_marks(place: Storage) -> Iterator[tuple[int, str]]:
    """Part and array of every mark there is."""
    names = (parse_mark_path(PurePosixPath(name)) for name in place.object_names(MARKS))
    return (mark for mark in names if mark is not None)


def _natural(array: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(s) if s.isdecimal() else -1, s) for s in re.split(r"(\d+)", array)]
