"""How objects are named and digested, wherever they lie."""

from collections.abc import Iterable

import xxhash

PIECE_BYTES = 1 << 20
_TEMPORARY = ".partial"  # the suffix of Zarr's own temporary files, so one rule finds both


def temporary_name(name: str, key: str) -> str:
    """A name beside `name` for what is to become it."""
    return f"{name}.{key}{_TEMPORARY}"


def is_temporary(name: str) -> bool:
    """Whether an object is the rest of an interrupted write, of ours or of Zarr's."""
    return name.endswith(_TEMPORARY)


def digest_pieces(pieces: Iterable[bytes]) -> str:
    """XXH3 of bytes, 128 bits in hexadecimal. Tells damage, not forgery, at disk speed."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
