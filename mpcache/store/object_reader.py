"""Read the objects of a store; their size is compared with the mark before the first read."""

import functools
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from mpcache.errors import DamagedStoreError
from mpcache.storage.base import Storage
from mpcache.store.array_metadata import check_metadata
from mpcache.store.array_spec import ArraySpec
from mpcache.store.disk_cache import ReadCache
from mpcache.store.mark import ObjectRecord
from mpcache.store.zarr_codec import ReadInto, decode_part, read_chunk_ends

Result = TypeVar("Result")


class ObjectReader:
    """Reads parts of Zarr arrays, and remembers sizes and shard indices. Threads may share it."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.cache: ReadCache | None = None
        # of the instance, so that they go with the store; an object's size is compared once, which
        # takes as long as a read: later reads raise where bytes are missing
        self._ends = functools.lru_cache(maxsize=1 << 12)(self._read_ends)
        self._check_size = functools.lru_cache(maxsize=1 << 16)(self._compare_size)
        self._span = functools.cache(functools.partial(check_metadata, storage))

    def read(
        self,
        spec: ArraySpec,
        part: int,
        record: ObjectRecord,
        start: int,
        stop: int,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Entries `start` to `stop` of one part of an array, into `out` if it is given.

        Raises DamagedStoreError where the bytes are not those that were committed.
        """
        name, size, key = spec.object_path(part), record.bytes, record.xxh3_128
        if part >= self._span(spec):
            raise DamagedStoreError(
                f"{self.storage}/{spec.metadata_path} is damaged: it has room for only "
                f"{self._span(spec)} parts, but the store also holds part {part}"
            )
        try:
            ends = self._ends(name, spec, size, key)
            return self._through(
                name, key, lambda read: decode_part(spec, read, ends, start, stop, out)
            )
        except FileNotFoundError:
            raise DamagedStoreError(
                f"{self.storage}/{name} is missing, but the store records it as written"
            ) from None
        except (ValueError, RuntimeError) as error:  # RuntimeError is Blosc's
            raise DamagedStoreError(f"{self.storage}/{name} is damaged: {error}") from error

    def _read_ends(self, name: str, spec: ArraySpec, size: int, key: str) -> tuple[int, ...]:
        self._check_size(name, size)
        return self._through(name, key, lambda read: read_chunk_ends(spec, read, size))

    def _through(self, name: str, key: str, decode: Callable[[ReadInto], Result]) -> Result:
        """Decode an object's bytes, through the read cache if any; `key` is the object's digest."""
        read = functools.partial(self.storage.read_into, name)
        return decode(read) if self.cache is None else self.cache.read_through(key, read, decode)

    def _compare_size(self, name: str, size: int) -> None:
        stored = self.storage.size(name)
        if stored is None:
            raise DamagedStoreError(
                f"{self.storage}/{name} is missing, but the store records it as written"
            )
        if stored != size:
            raise DamagedStoreError(
                f"{self.storage}/{name} is damaged: it must have {size} bytes, got {stored}"
            )
