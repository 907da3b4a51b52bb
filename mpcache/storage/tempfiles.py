"""Temporary names and digests of objects."""

from collections.abc import Iterable

import xxhash

PIECE_BYTES = 1 << 20
_TEMPORARY = ".partial"  # the suffix of Zarr's own temporary files, so one rule finds both


def temporary_name(name: str, key: str) -> str:
    """A temporary name beside `name`."""
    return f"{name}.{key}{_TEMPORARY}"


def is_temporary(name: str) -> bool:
    """Whether an object is the leftover of an interrupted write, of ours or of Zarr's."""
    return name.endswith(_TEMPORARY)


def digest_pieces(pieces: Iterable[bytes]) -> str:
    """XXH3 of bytes, 128 bits in hexadecimal. Detects damage at disk speed, not forgery."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
