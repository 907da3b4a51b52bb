"""Values of one array's part -> the bytes, digests and statistics that a commit writes.

Shapes: R rows, W width.
"""

import datetime
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from mpcache.store.array_spec import ArraySpec
from mpcache.store.digests import values_digest
from mpcache.store.mark import Mark, ObjectRecord, RowStatistics, TokenProgress
from mpcache.store.moments import measure_rows
from mpcache.store.object_paths import TOKENS, array_specs
from mpcache.store.part_layout import Layout
from mpcache.store.zarr_codec import encode_part

_INTEGER_VIEW = {torch.bfloat16: torch.uint16}  # NumPy and Zarr have no bfloat16: its 16 bits


@dataclass(frozen=True, kw_only=True)
class PartValues:
    """What one mark is to commit: values as they are stored, and what the mark says of them."""

    part: int
    array: str
    rows: int
    values: Mapping[ArraySpec, np.ndarray]
    "true values without padding, for each Zarr array of the mark"
    progress: TokenProgress | None = None
    statistics: RowStatistics | None = None

    @property
    def width(self) -> int:
        """Dimensions of an `acts` array; 0 for other arrays."""
        return self.statistics.width if self.statistics else 0

    def mark(
        self, layout: Layout, fingerprint: str, objects: Mapping[str, ObjectRecord], attempt: str
    ) -> Mark:
        """The mark of these values, by this machine, now."""
        return Mark(
            array=self.array,
            part=self.part,
            rows=self.rows,
            split=layout.split_of(self.part),
            objects=objects,
            fingerprint=fingerprint,
            host=socket.gethostname(),
            time=utc_now(),
            attempt=attempt,
            progress=self.progress,
            statistics=self.statistics,
        )


def utc_now() -> str:
    """Time of a mark: ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def token_values(
    layout: Layout,
    part: int,
    tokens: np.ndarray,
    flags: np.ndarray | None,
    progress: TokenProgress,
    rows: int | None,
) -> PartValues:
    """Tokens `[sequences, ctx_len]` of a part, and flags of the same shape if the layout has them.

    `rows` counts the true tokens, where the last sequence is filled up with zeros.
    """
    arrays = [tokens] if flags is None else [tokens, flags]
    values = dict(zip(array_specs(TOKENS, layout), arrays, strict=True))
    count = tokens.size if rows is None else rows
    return PartValues(part=part, array=TOKENS, rows=count, values=values, progress=progress)


def index_values(layout: Layout, part: int, array: str, values: np.ndarray) -> PartValues:
    """The sequence or the position of each row of a part."""
    (spec,) = array_specs(array, layout)
    return PartValues(part=part, array=array, rows=len(values), values={spec: values})


def acts_values(layout: Layout, part: int, array: str, x_RW: Float[Tensor, "R W"]) -> PartValues:
    """Rows of one side of a hookpoint in the storage dtype, with their norms and moments."""
    rows, width = x_RW.shape
    measured = measure_rows(x_RW)
    stored = x_RW.view(_INTEGER_VIEW.get(x_RW.dtype, x_RW.dtype)).numpy()
    moments = torch.stack([measured.moments.mean_W, measured.moments.variance_W])[None].numpy()
    arrays = (stored, measured.norms_R.numpy(), moments)
    return PartValues(
        part=part,
        array=array,
        rows=rows,
        values=dict(zip(array_specs(array, layout, width), arrays, strict=True)),
        statistics=measured.statistics,
    )


def encode_object(spec: ArraySpec, values: np.ndarray) -> Iterator[bytes]:
    """The bytes of the object that holds a part's true values, padded with zeros."""
    return encode_part(spec, _padded(values, spec.part_shape[0]))


def object_record(spec: ArraySpec, values: np.ndarray) -> ObjectRecord:
    """What a mark says of the object that holds these values."""
    digest, size = xxhash.xxh3_128(), 0
    for piece in encode_object(spec, values):
        digest.update(piece)
        size += len(piece)
    return ObjectRecord(
        bytes=size, xxh3_128=digest.hexdigest(), values_xxh3_128=values_digest([values])
    )


def _padded(values: np.ndarray, rows: int) -> np.ndarray:
    if len(values) == rows:
        return values
    padded = np.zeros((rows, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return padded
