"""Write parts of a store: values are encoded, then handed to the commit protocol or to a repair."""

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mpcache.errors import UsageError
from mpcache.storage.base import Storage
from mpcache.store.array_metadata import grow_array
from mpcache.store.commit import Committer
from mpcache.store.mark import Mark, TokenProgress, parse_mark
from mpcache.store.object_paths import POSITION, SEQUENCE, mark_path
from mpcache.store.part_encoder import PartValues, acts_values, index_values, token_values
from mpcache.store.part_layout import Layout


@runtime_checkable
class PartSink(Protocol):
    """What is done with an encoded part."""

    def commit(self, values: PartValues) -> None:
        """Take the values of one array's part."""
        ...

    def adopt(
        self, part: int, array: str, claim: bytes, sources: Mapping[str, Iterable[bytes]]
    ) -> bool:
        """Take what another store's mark commits; whether anything was written."""
        ...


class Writer:
    """Writes parts of one store. Parts are independent; one writer may serve several threads."""

    def __init__(
        self, storage: Storage, layout: Layout, fingerprint: str, sink: PartSink | None = None
    ) -> None:
        """Parts go to `sink`, by default to the commit protocol."""
        self.storage = storage
        self.layout = layout
        self.fingerprint = fingerprint
        self._sink = sink or Committer(storage, layout, fingerprint)

    def grow(self, array: str, parts: int, width: int = 0) -> None:
        """Make the Zarr metadata of an array for `parts` parts; longer metadata stays."""
        grow_array(self.storage, self.layout, array, parts, width)

    def commit_tokens(
        self,
        part: int,
        tokens: np.ndarray,
        flags: np.ndarray | None,
        progress: TokenProgress,
        rows: int | None = None,
    ) -> None:
        """Commit the tokens `[sequences, ctx_len]` of a part, with where the next part starts.

        `flags`, of the same shape, are given where the layout has token_flags. `rows` counts the
        true tokens, where the last sequence is filled up with zeros.
        """
        self._sink.commit(token_values(self.layout, part, tokens, flags, progress, rows))

    def commit_rows(self, part: int, token_of_row: np.ndarray) -> None:
        """Commit which token each row of a part is, counted along the part's sequences."""
        sequence, position = np.divmod(token_of_row, self.layout.ctx_len)
        sequence += part * self.layout.part_sequences
        self.commit_index(part, SEQUENCE, sequence.astype(np.uint32))
        self.commit_index(part, POSITION, position.astype(np.uint32))

    def commit_index(self, part: int, array: str, values: np.ndarray) -> None:
        """Commit the sequence or the position of each row of a part."""
        self._sink.commit(index_values(self.layout, part, array, values))

    def commit_acts(self, part: int, array: str, x_RW: Float[Tensor, "R W"]) -> None:
        """Commit one side of a hookpoint, rows in the order of the part, in the storage dtype."""
        self._sink.commit(acts_values(self.layout, part, array, x_RW))

    def adopt(
        self, part: int, array: str, claim: bytes, sources: Mapping[str, Iterable[bytes]]
    ) -> bool:
        """Write what another store's mark commits, mark and bytes alike; False: it was there.

        `claim` holds the bytes of that mark, `sources` those of its objects by path. Raises
        UsageError where the part is committed with other objects.
        """
        return self._sink.adopt(part, array, claim, sources)

    def mark(self, part: int, array: str) -> Mark:
        """The mark of a committed part; FileNotFoundError where there is none."""
        name = mark_path(part, array)
        data = self.storage.read(name)
        file = f"{self.storage}/{name}"
        return parse_mark(data, part, array, self.layout, self.fingerprint, file)


def check_object_size(storage: Storage, layout: Layout, widths: Iterable[int]) -> None:
    """Raise UsageError where a part of the widest array is too large for one object."""
    limit = storage.max_object_bytes
    row = max(widths, default=0) * getattr(torch, layout.dtype).itemsize
    if limit is not None and row * layout.part_rows > limit:
        raise UsageError(
            f"a part must fit into one object of {limit / 1e9:.0f} GB in {storage}, got "
            f"{row * layout.part_rows / 1e9:.1f} GB; use a smaller --part-rows, at most "
            f"{limit // row}"
        )
