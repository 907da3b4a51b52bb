"""The order in which an epoch reads a split: chunks are shuffled, then rows within windows.

Pure arithmetic on sizes: the same on every machine and with every version of NumPy, because it
uses only streams with a stability promise (SeedSequence, Philox; see NEP 19).
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpcache.errors import UsageError
from mpcache.splitmix64 import mix

Integers = NDArray[np.int64]

# Each round keeps an index or sends it to a uniformly drawn one, by a fair coin: after 64 rounds
# the probability of each result is uniform to 2^-64, for any n.
ROUNDS = 64


def epoch_order(
    part_sizes: Sequence[int], chunk_rows: int, *, seed: int, epoch: int, window: int
) -> "EpochOrder":
    """Return a permutation of all rows of parts with `part_sizes` rows; `window` is in chunks.

    Raises:
        UsageError: an argument is too small, or there are no rows.
    """
    for name, value, least in (
        ("chunk_rows", chunk_rows, 1),
        ("window", window, 1),
        ("seed", seed, 0),
        ("epoch", epoch, 0),
    ):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    if sum(part_sizes) < 1:
        raise UsageError(
            f"there are no rows to order, got {len(part_sizes)} parts without rows; give parts "
            "that have rows"
        )
    return EpochOrder(part_sizes, chunk_rows, (seed, epoch), window)


@dataclass(frozen=True)
class Chunk:
    """A chunk to read."""

    part: int
    "index of its part in `part_sizes`"
    chunk: int
    "number of the chunk in its part"
    rows: int
    "rows in it; fewer than `chunk_rows` only at the end of a part"


@dataclass(frozen=True)
class Window:
    """Chunks whose rows are shuffled together."""

    chunks: tuple[Chunk, ...]
    key: tuple[int, int, int]
    "seed, epoch and number of the window"

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)

    def permutation(self) -> Integers:
        """Row `i` of the window's order is row `permutation()[i]` of its chunks laid end to end."""
        seed, *epoch_and_number = self.key
        noise = np.random.Philox(np.random.SeedSequence(seed, spawn_key=epoch_and_number))
        # the low bits hold the row: distinct words sort the same way everywhere, and sorting them
        # takes a tenth of the time of an argsort
        row_bits = np.uint64((1 << self.rows.bit_length()) - 1)
        words = (noise.random_raw(self.rows) & ~row_bits) | np.arange(self.rows, dtype=np.uint64)
        words.sort()
        return (words & row_bits).astype(np.int64)


class EpochOrder:
    """Windows in the order of reading; O(parts) memory, and O(window) for each window."""

    def __init__(
        self, part_sizes: Sequence[int], chunk_rows: int, key: tuple[int, int], window: int
    ) -> None:
        self._sizes = np.asarray(part_sizes, dtype=np.int64)
        self._chunk_rows, self._key, self._window = chunk_rows, key, window
        chunks = -(-self._sizes // chunk_rows)
        self._first = np.concatenate([[0], np.cumsum(chunks)])  # chunks before each part
        self._shuffle = Shuffle(int(self._first[-1]), key)
        self._find_short(chunks * chunk_rows - self._sizes)
        self.windows = -(-int(self._first[-1]) // window)

    def _find_short(self, missing: Integers) -> None:
        """Find the shuffled positions of short last chunks, which a seek must account for."""
        short = missing > 0
        positions = self._shuffle.inverse(self._first[1:][short] - 1)
        sort = np.argsort(positions)
        self._short_positions = positions[sort]
        self._missing = np.concatenate([[0], np.cumsum(missing[short][sort])])

    def __len__(self) -> int:
        """Rows in the epoch."""
        return int(self._sizes.sum())

    def start(self, number: int) -> int:
        """Rows before the window of that number."""
        index = min(number * self._window, int(self._first[-1]))
        short = np.searchsorted(self._short_positions, index)
        return index * self._chunk_rows - int(self._missing[short])

    def locate(self, offset: int) -> tuple[int, int]:
        """Return the number of the window that holds row `offset`, and its rows before that row."""
        if not 0 <= offset < len(self):
            raise UsageError(f"offset must be in [0, {len(self)}), got {offset}")
        number = bisect.bisect_right(range(self.windows), offset, key=self.start) - 1
        return number, offset - self.start(number)

    def window(self, number: int) -> Window:
        """Return the chunks of a window, in the order in which they are laid end to end."""
        if not 0 <= number < self.windows:
            raise IndexError(f"window must be in [0, {self.windows}), got {number}")
        end = min((number + 1) * self._window, int(self._first[-1]))
        chunk = self._shuffle(np.arange(number * self._window, end))
        part = np.searchsorted(self._first, chunk, side="right") - 1
        in_part = chunk - self._first[part]
        rows = np.minimum(self._chunk_rows, self._sizes[part] - in_part * self._chunk_rows)
        triples = zip(part.tolist(), in_part.tolist(), rows.tolist(), strict=True)
        return Window(tuple(Chunk(*triple) for triple in triples), (*self._key, number))


class Shuffle:
    """A permutation of `range(n)` computed index by index, without a table.

    Swap-or-not (Hoang, Morris and Rogaway, CRYPTO 2012): each round is its own inverse, and any
    `n` will do, where a Feistel network would have to walk cycles and is poor for small `n`.
    """

    def __init__(self, n: int, key: tuple[int, int]) -> None:
        seed, epoch = key
        words = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(
            2 * ROUNDS, np.uint64
        )
        self._n = np.uint64(n)
        self._rounds = list(zip(words[:ROUNDS] % self._n, words[ROUNDS:], strict=True))

    def __call__(self, index: Integers) -> Integers:
        return self._swap(index, self._rounds)

    def inverse(self, image: Integers) -> Integers:
        return self._swap(image, reversed(self._rounds))

    def _swap(self, index: Integers, rounds: Iterable[tuple[np.uint64, np.uint64]]) -> Integers:
        x = index.astype(np.uint64)
        for shift, key in rounds:
            partner = (shift + self._n - x) % self._n
            coin = mix(np.maximum(x, partner) ^ key) >> np.uint64(63)
            x = np.where(coin == 1, partner, x)
        return x.astype(np.int64)
