"""Read a store: only what is marked, and nothing that differs from its mark.

Existence and size of an object are checked against the mark before its first read, then the
`crc32c` of its index and of each chunk that is read.
"""

import functools
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from mpcache.config import Split
from mpcache.errors import DamagedStoreError
from mpcache.storage.base import Storage, open_storage
from mpcache.store.description import Description
from mpcache.store.format import (
    BY_ASSISTANT,
    POSITION,
    SEQUENCE,
    STARTS_DOCUMENT,
    TOKEN_FLAGS,
    TOKENS,
    ZARR_DTYPE,
    acts_array,
    array_specs,
    check_mark,
    committed_length,
    hookpoint_of,
    is_store,
    mark_path,
    unseal,
)
from mpcache.store.mark_index import committed_parts
from mpcache.store.moments import Moments, empty_moments, merge_moments
from mpcache.store.object_reader import ObjectReader
from mpcache.store.read_cache import ReadCache
from mpcache.store.token_plan import first_missing_parts
from mpcache.store.zarr_codec import ArraySpec

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """A committed part: its number, how many rows it really has, and its split."""

    number: int
    rows: int
    split: Split


class Store(Description):
    """A store opened for reading. Threads may share it; it looks for commits once."""

    def __init__(self, place: Storage) -> None:
        super().__init__(place)
        self._objects_of = ObjectReader(place)

    @property
    def read_cache(self) -> ReadCache | None:
        """A local copy of bytes that were read before."""
        return self._objects_of.cache

    @read_cache.setter
    def read_cache(self, cache: ReadCache | None) -> None:
        self._objects_of.cache = cache

    def __reduce__(self) -> tuple[Any, ...]:
        """Where it arrives, it is opened again, without a read cache."""
        return _opened_there, (self.storage, self.digest)

    @functools.cached_property
    def _marks(self) -> dict[str, set[int]]:
        # not in __init__: who wants one part alone, as a worker does, need not list all marks
        return committed_parts(self.storage)

    @property
    def planned_parts(self) -> tuple[int, ...]:
        """Parts whose tokens and rows are committed: the model reads, or has read, these."""
        return self.part_numbers(POSITION)

    @property
    def is_planned(self) -> bool:
        """Whether the tokens of all parts that its first collection asked for are committed."""
        return self.has_planned(self.layout.parts_for(int(self.config["rows"])))

    def has_planned(self, parts: int) -> bool:
        """Whether the tokens of the first parts are committed, as far as the dataset has them."""
        return not self.first_missing_parts(parts)

    def first_missing_parts(self, parts: int) -> dict[int, int | None]:
        """The first of so many parts that lacks tokens, by split; see `store.token_plan`."""
        arrays = (TOKENS, SEQUENCE, POSITION)
        committed = set.intersection(*(set(self.part_numbers(array)) for array in arrays))
        return first_missing_parts(
            committed,
            parts,
            self.layout.validation_every,
            lambda part: bool(self.mark(part, TOKENS)["last"]),
        )

    def limited_to(self, parts: Collection[int]) -> "Store":
        """The same store as it would be if no other parts were committed."""
        other = Store(self.storage)
        other.read_cache = self.read_cache
        left = {array: found & set(parts) for array, found in self._marks.items()}
        other._marks = {array: found for array, found in left.items() if found}
        return other

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays that have a committed part, tokens and rows included."""
        return tuple(self._marks)

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Hookpoints with a committed part."""
        return tuple(
            dict.fromkeys(hookpoint_of(a)[0] for a in self._marks if a.startswith("acts/"))
        )

    def sides(self, hookpoint: str) -> tuple[str, ...]:
        """Collected sides of a hookpoint."""
        found = tuple(s for s in ("input", "output") if acts_array(hookpoint, s) in self._marks)
        if not found:
            raise ValueError(
                f"{self.storage} has no hookpoint {hookpoint!r}; "
                f"it has {', '.join(self.hookpoints) or 'none'}"
            )
        return found

    def width(self, hookpoint: str, side: str) -> int:
        """Dimensions of one side of a hookpoint."""
        array = self._acts(hookpoint, side)
        return int(self.mark(min(self._marks[array]), array)["width"])

    def part_numbers(self, array: str) -> tuple[int, ...]:
        """Committed parts of an array, in order."""
        return tuple(sorted(self._marks.get(array, ())))

    def parts(self, sides: Sequence[tuple[str, str]], split: Split) -> tuple[Part, ...]:
        """Parts of a split that are committed for all the named sides, in order."""
        arrays = [self._acts(*side) for side in sides]
        common = set.intersection(*(self._marks[a] for a in [*arrays, POSITION]))
        wanted = [n for n in sorted(common) if self.layout.split_of(n) == split]
        rows = [[int(mark["rows"]) for mark in self.marks(a, wanted)] for a in [*arrays, POSITION]]
        for number, *told in zip(wanted, *rows, strict=True):
            if len(set(told)) > 1:
                raise DamagedStoreError(f"marks of part {number} in {self.storage} differ in rows")
        return tuple(Part(*one, split) for one in zip(wanted, rows[0], strict=True))

    def marks(self, array: str, parts: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Commit marks of some parts of one array, or of all, in order; several read at a time."""
        wanted = self.part_numbers(array) if parts is None else parts
        return self._map_parts(lambda part: self.mark(part, array), wanted)

    @functools.lru_cache(maxsize=1 << 14)  # noqa: B019  a store lives as long as its reader
    def mark(self, part: int, array: str) -> dict[str, Any]:
        """Commit mark of one array's part."""
        file = f"{self.storage}/{mark_path(part, array)}"
        try:
            content = unseal(self.storage.read(mark_path(part, array)), file)
        except FileNotFoundError:
            raise DamagedStoreError(f"{file} was there and is gone; open the store anew") from None
        check_mark(content, part, array, self.layout, self.fingerprint, file)
        return content

    def read_chunk(
        self, hookpoint: str, side: str, part: int, chunk: int, out: Tensor | None = None
    ) -> Float[Tensor, "rows width"]:
        """Rows of one chunk that are real, in the storage dtype; `out`, filled, if it is given."""
        array, dtype = self._acts(hookpoint, side), getattr(torch, self.layout.dtype)
        stored = getattr(torch, ZARR_DTYPE[self.layout.dtype])
        memory = None if out is None else out.view(stored).numpy()
        return torch.from_numpy(self._read_rows(array, part, chunk, memory)).view(dtype)

    def read_positions(self, part: int, chunk: int | None = None) -> Int64[Tensor, " rows"]:
        """Position of each row of one chunk, or of a whole part, in what the model saw together.

        That is the row's sequence, or its piece of a document where each was run alone.
        """
        position = self._read_rows(POSITION, part, chunk).astype(np.int64)
        if (starts_SL := self.read_document_starts(part)) is not None:
            sequence = self.read_sequences(part, chunk).numpy()
            position = _piece_positions(starts_SL)[self._token(sequence, position, part)]
        return torch.from_numpy(position)

    def read_sequences(self, part: int, chunk: int | None = None) -> Int64[Tensor, " rows"]:
        """Sequence of each row of one chunk, or of a whole part, counted over the whole store."""
        return torch.from_numpy(self._read_rows(SEQUENCE, part, chunk).astype(np.int64))

    def read_token_ids(self, part: int, chunk: int | None = None) -> Int64[Tensor, " rows"]:
        """Token id of each row of one chunk, or of a whole part."""
        token = self._token_of_row(part, chunk)
        return torch.from_numpy(self.read_tokens(part).reshape(-1)[token].astype(np.int64))

    def read_assistant(self, part: int, chunk: int | None = None) -> Bool[Tensor, " rows"] | None:
        """Whether the assistant wrote the token of each row; None: the store does not say."""
        if not self.has_assistant:
            return None
        flags_SL = self.read_flags(part)
        assert flags_SL is not None
        written = (flags_SL.reshape(-1)[self._token_of_row(part, chunk)] & BY_ASSISTANT) > 0
        return torch.from_numpy(written)

    def read_norms(
        self, hookpoint: str, side: str, part: int, chunk: int | None = None
    ) -> Float[Tensor, " rows"]:
        """Euclidean norm of each row of one chunk, or of a whole part."""
        array = self._acts(hookpoint, side)
        _, spec, _ = array_specs(array, self.layout, self.width(hookpoint, side))
        norms = self.read_object(array, spec, part, *self._extent(array, part, chunk))
        return torch.from_numpy(norms)

    def read_tokens(self, part: int) -> np.ndarray:
        """Token ids `[sequences, ctx_len]` of a part; zeros fill up the last sequence."""
        return self._read_beside_tokens(TOKENS, part)

    def read_flags(self, part: int) -> UInt8[np.ndarray, "S L"] | None:
        """Flags of the tokens of a part, as bits; None: the store has none."""
        return self._read_beside_tokens(TOKEN_FLAGS, part) if self.layout.token_flags else None

    def read_document_starts(self, part: int) -> Bool[np.ndarray, "S L"] | None:
        """Where the pieces of documents start that the model saw one by one.

        None: the model saw whole sequences.
        """
        if not self.has_lone_documents:
            return None
        flags_SL = self.read_flags(part)
        assert flags_SL is not None
        return (flags_SL & STARTS_DOCUMENT) > 0

    def empty_documents(self, parts: Sequence[int] | None = None) -> int | None:
        """Documents without tokens that some parts, or all, left out; None: such are kept."""
        if "empty_documents" not in self.identity:
            return None
        return sum(int(mark.get("empty_documents", 0)) for mark in self.marks(TOKENS, parts))

    def token_count(self, part: int) -> int:
        """True tokens of a part, which are its rows."""
        return int(self.mark(part, TOKENS)["rows"])

    def read_part(self, array: str, part: int) -> dict[str, np.ndarray]:
        """All that one mark committed, as stored (bfloat16 as its 16 bits), by array name."""
        mark = self.mark(part, array)
        values = {}
        for spec in array_specs(array, self.layout, int(mark.get("width", 0))):
            real = committed_length(spec, array, int(mark["rows"]), self.ctx_len)
            values[spec.name] = self.read_object(array, spec, part, 0, real)
        return values

    def moments(
        self, hookpoint: str, side: str, split: Split | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance per dimension, float64, over finite committed rows (of a split)."""
        array = self._acts(hookpoint, side)
        parts = [n for n in self.part_numbers(array) if split in (None, self.layout.split_of(n))]
        total = empty_moments(self.width(hookpoint, side))
        for one in self._map_parts(lambda part: self.part_moments(array, part), parts):
            total = merge_moments([total, one])
        return total.mean_W, total.variance_W

    def part_moments(self, array: str, part: int) -> Moments:
        """Moments of one part of an `acts` array, over its finite rows."""
        mark = self.mark(part, array)
        _, _, spec = array_specs(array, self.layout, int(mark["width"]))
        mean_W, variance_W = torch.from_numpy(self.read_object(array, spec, part, 0, 1)[0])
        return Moments(int(mark["finite_rows"]), mean_W, variance_W)

    def stored_bytes(self, sides: Sequence[tuple[str, str]], split: Split) -> int:
        """Bytes of a split's rows on these sides, and of their positions, as they are stored."""
        return sum(int(told["bytes"]) for told in self._objects(sides, split))

    def cached_bytes(self, sides: Sequence[tuple[str, str]], split: Split) -> int:
        """Of those bytes, the ones that the read cache has."""
        if self.read_cache is None:
            return 0
        return sum(self.read_cache.size(told["xxh3_128"]) for told in self._objects(sides, split))

    def _objects(self, sides: Sequence[tuple[str, str]], split: Split) -> Iterator[dict[str, Any]]:
        """What marks say of the objects with a split's rows on these sides and their positions."""
        arrays = {POSITION, *(self._acts(*side) for side in sides)}
        for part in self.parts(sides, split):
            for array in arrays:
                mark = self.mark(part.number, array)
                spec = array_specs(array, self.layout, int(mark.get("width", 0)))[0]
                yield mark["objects"][spec.object_path(part.number)]

    def nonfinite(self, hookpoint: str, side: str) -> int:
        """Values of one side that are infinite or not a number, in all committed parts."""
        array = self._acts(hookpoint, side)
        return sum(int(mark["nonfinite"]) for mark in self.marks(array))

    def _map_parts(self, read: Callable[[int], Result], parts: Sequence[int]) -> list[Result]:
        """Read something of several parts, so many at a time as the place is worth."""
        if self.storage.concurrency == 1:
            return [read(part) for part in parts]
        with ThreadPoolExecutor(self.storage.concurrency, "read") as pool:
            return list(pool.map(read, parts))

    def _acts(self, hookpoint: str, side: str) -> str:
        if side not in self.sides(hookpoint):
            raise ValueError(
                f"{self.storage} has no {side} of {hookpoint}, "
                f"only its {' and '.join(self.sides(hookpoint))}; "
                f"collect it with --hookpoints {hookpoint}:{side}"
            )
        return acts_array(hookpoint, side)

    def _read_beside_tokens(self, name: str, part: int) -> np.ndarray:
        (spec,) = (spec for spec in array_specs(TOKENS, self.layout) if spec.name == name)
        sequences = committed_length(spec, TOKENS, self.token_count(part), self.ctx_len)
        return self.read_object(TOKENS, spec, part, 0, sequences)

    def _token_of_row(self, part: int, chunk: int | None) -> np.ndarray:
        """The token of each row, counted along the part's sequences."""
        sequence = self._read_rows(SEQUENCE, part, chunk).astype(np.int64)
        return self._token(sequence, self._read_rows(POSITION, part, chunk), part)

    def _token(self, sequence: np.ndarray, position: np.ndarray, part: int) -> np.ndarray:
        token: np.ndarray = (sequence - part * self.layout.part_sequences) * self.ctx_len + position
        return token

    def _read_rows(
        self, array: str, part: int, chunk: int | None, out: np.ndarray | None = None
    ) -> np.ndarray:
        spec = array_specs(array, self.layout, int(self.mark(part, array).get("width", 0)))[0]
        return self.read_object(array, spec, part, *self._extent(array, part, chunk), out)

    def _extent(self, array: str, part: int, chunk: int | None) -> tuple[int, int]:
        """First row of a chunk in its part, or of all of them, and the one after its last."""
        rows = int(self.mark(part, array)["rows"])
        if chunk is None:
            return 0, rows
        start = chunk * self.chunk_rows
        return start, min(start + self.chunk_rows, rows)

    def read_object(
        self,
        array: str,
        spec: ArraySpec,
        part: int,
        start: int,
        stop: int,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Entries `start` to `stop` of one part of one Zarr array, checked against the mark.

        They are put into `out`, of the array's type, if it is given.
        """
        record = self.mark(part, array)["objects"][spec.object_path(part)]
        return self._objects_of.read(spec, part, record, start, stop, out)


def open_store(
    where: str | Path | Storage, cache_dir: str | None = None, cache_bytes: int | None = None
) -> Store:
    """Open a store for reading; `cache_dir`, a local folder, keeps up to `cache_bytes` of it.

    Raises:
        ValueError: there is no store, or it has an unknown format version; or an unfit cache_dir.
        DamagedStoreError: `store.json` is not what was written.
    """
    store = Store(open_storage(where))
    if cache_dir is not None:
        store.read_cache = ReadCache(cache_dir, cache_bytes, store.storage, store.digest)
    return store


def _opened_there(place: Storage, told: str) -> Store:
    """Open a store that another process has open; raises ValueError where there is another one."""
    if not is_store(place) or (store := open_store(place)).digest != told:
        raise ValueError(
            f"{place} must be one folder that all machines share, got another one on "
            f"{socket.gethostname()}; use a path on a shared file system"
        )
    return store


def _piece_positions(starts_SL: Bool[np.ndarray, "S L"]) -> Int64[np.ndarray, " tokens"]:
    """Position of each token of a part in its piece."""
    token = np.arange(starts_SL.size)
    return token - np.maximum.accumulate(np.where(starts_SL.reshape(-1), token, 0))
