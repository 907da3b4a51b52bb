"""XXH3 digests of objects and of decoded values. They detect damage at disk speed, not forgery."""

from collections.abc import Iterable

import numpy as np
import xxhash

from mpcache.storage.base import Storage
from mpcache.store.mark import ObjectRecord


def digest_pieces(pieces: Iterable[bytes]) -> str:
    """XXH3 of bytes, 128 bits in hexadecimal."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def values_digest(pieces: Iterable[np.ndarray]) -> str:
    """XXH3 of decoded values: little-endian, C order, without padding."""
    digest = xxhash.xxh3_128()
    for values in pieces:
        little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
        digest.update(little.data.cast("B"))
    return digest.hexdigest()


def object_matches(storage: Storage, name: str, record: ObjectRecord) -> bool:
    """Whether an object has the size and the bytes that a mark records."""
    return storage.size(name) == record.bytes and (
        digest_pieces(storage.read_pieces(name)) == record.xxh3_128
    )
