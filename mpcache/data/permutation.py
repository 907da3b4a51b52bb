"""Seeded permutations that no library upgrade changes."""

import hashlib

import numpy as np
from jaxtyping import Int64


def seeded_permutation(count: int, key: str) -> Int64[np.ndarray, " count"]:
    """A permutation of range(count) that `key` determines: indices sorted by their SplitMix64 hash.

    numpy's own generators may change between versions. An extended store would then train on
    documents that it had held out before.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    mixed = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable").astype(np.int64, copy=False)


def row_permutation(seed: int, part: int, rows: int) -> Int64[np.ndarray, " rows"]:
    """For each row of a part the flat index of its token: sequence * ctx_len + position."""
    return seeded_permutation(rows, f"rows {seed} {part}")
