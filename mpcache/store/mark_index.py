"""The commit marks of a store: the parts of each array, and what each mark says."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TypeVar

from mpcache.errors import DamagedStoreError
from mpcache.natural_sort import natural_key
from mpcache.storage.base import Storage
from mpcache.store.mark import Mark, TokenProgress, parse_mark
from mpcache.store.next_token_parts import first_missing_parts
from mpcache.store.object_paths import MARKS, POSITION, SEQUENCE, TOKENS, mark_path, parse_mark_path
from mpcache.store.part_layout import Layout

Result = TypeVar("Result")


class MarkIndex:
    """Lists the marks once and reads each mark once. Threads may share it."""

    def __init__(self, storage: Storage, layout: Layout, fingerprint: str) -> None:
        self.storage = storage
        self.layout = layout
        self.fingerprint = fingerprint
        # of the instance, so that the cache goes with the store
        self.mark = functools.lru_cache(maxsize=1 << 14)(self._read_mark)

    @functools.cached_property
    def parts(self) -> Mapping[str, set[int]]:
        """The committed parts of each array, arrays in natural order."""
        # not in __init__: a worker wants single parts, and need not list all marks
        parts: dict[str, set[int]] = {}
        for part, array in committed_marks(self.storage):
            parts.setdefault(array, set()).add(part)
        return {array: parts[array] for array in sorted(parts, key=natural_key)}

    def part_numbers(self, array: str) -> tuple[int, ...]:
        """Committed parts of an array, in order."""
        return tuple(sorted(self.parts.get(array, ())))

    def marks(self, array: str, parts: Sequence[int] | None = None) -> list[Mark]:
        """Marks of some parts of an array, or of all parts, in order; read in parallel."""
        numbers = self.part_numbers(array) if parts is None else parts
        return self.map_parts(lambda part: self.mark(part, array), numbers)

    def token_progress(self, part: int) -> TokenProgress:
        """Which documents the tokens of a part come from."""
        progress = self.mark(part, TOKENS).progress
        assert progress is not None
        return progress

    def has_planned(self, parts: int) -> bool:
        """Whether the tokens and rows of the first parts are committed.

        Parts after the end of the dataset are not missing.
        """
        return not self.first_missing_parts(parts)

    def first_missing_parts(self, parts: int) -> dict[int, int | None]:
        """The first of `parts` parts that lacks tokens, by split; see `store.token_plan`."""
        arrays = (TOKENS, SEQUENCE, POSITION)
        committed = set.intersection(*(set(self.part_numbers(array)) for array in arrays))
        return first_missing_parts(
            committed,
            parts,
            self.layout.validation_every,
            lambda part: self.token_progress(part).last,
        )

    def limited_to(self, parts: Collection[int]) -> "MarkIndex":
        """The index as it would be if no other parts were committed."""
        limited = MarkIndex(self.storage, self.layout, self.fingerprint)
        kept = {array: numbers & set(parts) for array, numbers in self.parts.items()}
        limited.parts = {array: numbers for array, numbers in kept.items() if numbers}
        return limited

    def map_parts(self, read: Callable[[int], Result], parts: Sequence[int]) -> list[Result]:
        """Call `read` for each part, several at a time where the storage is worth it."""
        if self.storage.concurrency == 1:
            return [read(part) for part in parts]
        with ThreadPoolExecutor(self.storage.concurrency, "read") as pool:
            return list(pool.map(read, parts))

    def _read_mark(self, part: int, array: str) -> Mark:
        """The mark of one array's part; raises DamagedStoreError where it is gone or damaged."""
        name = mark_path(part, array)
        file = f"{self.storage}/{name}"
        try:
            data = self.storage.read(name)
        except FileNotFoundError:
            raise DamagedStoreError(
                f"{file} was removed while the store was open; open the store again"
            ) from None
        return parse_mark(data, part, array, self.layout, self.fingerprint, file)


def committed_marks(storage: Storage) -> Iterator[tuple[int, str]]:
    """Part and array of every mark in a store."""
    marks = (parse_mark_path(PurePosixPath(name)) for name in storage.object_names(MARKS))
    return (mark for mark in marks if mark is not None)
