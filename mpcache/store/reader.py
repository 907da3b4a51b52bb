"""Open a store and read it: only what is marked, and nothing that differs from its mark.

Existence and size of an object are checked against the mark before its first read, then the
CRC32C of its index and of each chunk that is read.
"""

import socket
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mpcache.config import Split
from mpcache.errors import DamagedStoreError, UsageError
from mpcache.storage.base import Storage, open_storage
from mpcache.store.acts_array import ActsArray, Part
from mpcache.store.acts_reader import ActsReader
from mpcache.store.disk_cache import ReadCache
from mpcache.store.mark import Mark, ObjectRecord
from mpcache.store.mark_index import MarkIndex
from mpcache.store.object_paths import POSITION, array_specs
from mpcache.store.object_reader import ObjectReader
from mpcache.store.part_reader import PartReader
from mpcache.store.store_metadata import StoreMetadata, is_store
from mpcache.store.token_reader import TokenReader

__all__ = ["ActsArray", "Part", "Store", "open_store"]


class Store(StoreMetadata):
    """A store opened for reading. Threads may share it; it lists the committed parts once.

    `store["layers.10:output"]` gives the rows of one side of a hookpoint as an array, and
    `store.rows("layers.10:output", split="train")` iterates them in bounded memory.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self._open(MarkIndex(storage, self.layout, self.fingerprint))

    def _open(self, index: MarkIndex) -> None:
        self.index = index
        self._objects = ObjectReader(self.storage)
        self.reader = PartReader(index, self._objects)
        self.acts = ActsReader(self.reader)
        self.tokens = TokenReader(self, self.reader)

    def __repr__(self) -> str:
        return f"Store({str(self.storage)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store again, without a read cache."""
        return _open_same, (self.storage, self.digest)

    @property
    def read_cache(self) -> ReadCache | None:
        """A local copy of bytes that were read before."""
        return self._objects.cache

    @read_cache.setter
    def read_cache(self, cache: ReadCache | None) -> None:
        self._objects.cache = cache

    def limited_to(self, parts: Collection[int]) -> "Store":
        """The same store as it would be if no other parts were committed."""
        limited = Store(self.storage)
        limited._open(self.index.limited_to(parts))
        limited.read_cache = self.read_cache
        return limited

    # --- what is committed ---

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays that have a committed part, tokens and rows included."""
        return tuple(self.index.parts)

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Hookpoints with a committed part, in natural order."""
        return self.acts.hookpoints

    def sides(self, hookpoint: str) -> tuple[str, ...]:
        """Collected sides of a hookpoint: `input`, `output`, or both."""
        return self.acts.sides(hookpoint)

    def width(self, hookpoint: str, side: str) -> int:
        """Dimensions of one side of a hookpoint."""
        return self.acts.width(hookpoint, side)

    def part_numbers(self, array: str) -> tuple[int, ...]:
        """Committed parts of an array, in order."""
        return self.index.part_numbers(array)

    @property
    def planned_parts(self) -> tuple[int, ...]:
        """Parts whose tokens and rows are committed: the model has read these, or will."""
        return self.part_numbers(POSITION)

    @property
    def is_planned(self) -> bool:
        """Whether the tokens of all parts that its first collection asked for are committed."""
        return self.index.has_planned(self.layout.parts_for(int(self.config["rows"])))

    def mark(self, part: int, array: str) -> Mark:
        """Commit mark of one array's part."""
        return self.index.mark(part, array)

    def marks(self, array: str, parts: Sequence[int] | None = None) -> list[Mark]:
        """Commit marks of some parts of an array, or of all parts, in order."""
        return self.index.marks(array, parts)

    def parts(self, sides: Sequence[tuple[str, str]], split: Split | None) -> tuple[Part, ...]:
        """Parts of a split, or of both, that are committed for all the named sides, in order."""
        arrays = [*(self.acts.array(*side) for side in sides), POSITION]
        common = set.intersection(*(set(self.index.parts.get(a, ())) for a in arrays))
        numbers = [n for n in sorted(common) if split in (None, self.layout.split_of(n))]
        rows = [[mark.rows for mark in self.marks(array, numbers)] for array in arrays]
        for number, *counts in zip(numbers, *rows, strict=True):
            if len(set(counts)) > 1:
                raise DamagedStoreError(
                    f"part {number} of {self.storage} is damaged: its arrays have different "
                    f"numbers of rows ({', '.join(map(str, sorted(set(counts))))})"
                )
        return tuple(
            Part(number, count, self.layout.split_of(number))
            for number, count in zip(numbers, rows[0], strict=True)
        )

    def stored_bytes(self, sides: Sequence[tuple[str, str]], split: Split) -> int:
        """Bytes of a split's rows on these sides, and of their positions, as they are stored."""
        return sum(record.bytes for record in _records(self, sides, split))

    def cached_bytes(self, sides: Sequence[tuple[str, str]], split: Split) -> int:
        """Of those bytes, the ones that the read cache has."""
        if self.read_cache is None:
            return 0
        return sum(self.read_cache.size(r.xxh3_128) for r in _records(self, sides, split))

    # --- rows ---

    def __getitem__(self, name: str) -> ActsArray:
        """Committed rows of one side of a hookpoint, `[rows, width]`, read on demand.

        `name` is `HOOKPOINT:SIDE`; the side may be left out where only one is collected.

            >>> store = open_store("store")
            >>> store["layers.0:output"].shape[1] == store.width("layers.0", "output")
            True

        Raises UsageError for a hookpoint or side that the store does not have.
        """
        side = self.acts.parse_side(name)
        return ActsArray(self.acts, *side, self.parts([side], None))

    def rows(self, name: str, split: Split | None = None) -> Iterator[Float[Tensor, "rows width"]]:
        """Iterate the committed rows of one side of a hookpoint in stored order.

        Each tensor is a chunk, at most `chunk_rows` rows, in the dtype of the store (bfloat16
        arrives as `torch.bfloat16`). One chunk is in memory at a time. `name` is as in
        `store[name]`; `split` is `train`, `validation`, or None for both.

            >>> store = open_store("store")
            >>> count = sum(len(x) for x in store.rows("layers.0:output", split="train"))

        Raises UsageError for a hookpoint, side or split that the store does not have, and
        DamagedStoreError where bytes are not those that were committed.
        """
        if split is not None and split not in get_args(Split):
            raise UsageError(f"split must be {' or '.join(get_args(Split))}, got {split!r}")
        return self[name].chunks(split)

    def read_part(self, array: str, part: int) -> dict[str, np.ndarray]:
        """All that one mark commits, as stored (bfloat16 as its 16 bits), by array name."""
        return self.reader.read_part(array, part)


def open_store(
    where: str | Path | Storage, cache_dir: str | None = None, cache_bytes: int | None = None
) -> Store:
    """Open a store for reading. It sees the parts that are committed when they are first listed.

    Args:
        where: Path, or `s3://` or `gs://` URL, of the store.
        cache_dir: Local folder that keeps what is read of a distant store, for later reads.
        cache_bytes: Most bytes in that folder; None: until a twentieth of its file system is left.

        >>> open_store("store").hookpoints
        ('layers.0', 'layers.1.mlp')

    Raises:
        UsageError: there is no store, it has an unknown format version, or cache_dir is unfit.
        DamagedStoreError: `store.json` is not what was written.
    """
    store = Store(open_storage(where))
    if cache_dir is not None:
        store.read_cache = ReadCache(cache_dir, cache_bytes, store.storage, store.digest)
    return store


def _open_same(storage: Storage, digest: str) -> Store:
    """Open the store that another process has open; raises UsageError where it is another one."""
    if not is_store(storage) or (store := open_store(storage)).digest != digest:
        raise UsageError(
            f"{storage} must be the same store on all machines, got another store or none on "
            f"{socket.gethostname()}; give a path on a shared file system"
        )
    return store


def _records(
    store: Store, sides: Sequence[tuple[str, str]], split: Split
) -> Iterator[ObjectRecord]:
    """Records of the objects that hold a split's rows on these sides, and of their positions."""
    arrays = {POSITION, *(store.acts.array(*side) for side in sides)}
    for part in store.parts(sides, split):
        for array in arrays:
            mark = store.mark(part.number, array)
            spec = array_specs(array, store.layout, mark.width)[0]
            yield mark.objects[spec.object_path(part.number)]
