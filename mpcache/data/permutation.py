"""Seeded permutations that no library upgrade changes."""

import hashlib

import numpy as np
from jaxtyping import Int64

from mpcache.splitmix64 import mix


def seeded_permutation(count: int, key: str) -> Int64[np.ndarray, " count"]:
    """A permutation of range(count) that `key` determines: indices sorted by their SplitMix64 hash.

    numpy's own generators may change between versions. An extended store would then train on
    documents that it had held out before.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    words = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    return np.argsort(mix(words), kind="stable").astype(np.int64, copy=False)


def row_permutation(seed: int, part: int, rows: int) -> Int64[np.ndarray, " rows"]:
    """For each row of a part the flat index of its token: sequence * ctx_len + position."""
    return seeded_permutation(rows, f"rows {seed} {part}")
