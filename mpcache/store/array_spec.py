"""A Zarr array of a store: its shape, its objects and its `zarr.json`."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from mpcache.config import Codec

GROUP = "arrays.zarr"
_STEP_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One Zarr array: a part is one object (a shard, or a lone chunk) along the first axis."""

    name: str
    dtype: str
    part_shape: tuple[int, ...]
    chunk: int
    "entries in a chunk, along the first axis"
    codec: Codec = "none"
    attributes: tuple[tuple[str, str], ...] = field(default=())

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return self.chunk, *self.part_shape[1:]

    @property
    def chunks(self) -> int:
        """Chunks in a part."""
        return self.part_shape[0] // self.chunk

    def steps(self, length: int) -> Iterator[tuple[int, int]]:
        """The first `length` entries as spans of whole chunks, about 8 MB at a time."""
        entry = math.prod(self.part_shape[1:]) * np.dtype(self.dtype).itemsize
        step = self.chunk * max(1, _STEP_BYTES // (self.chunk * entry))
        return ((start, min(start + step, length)) for start in range(0, length, step))

    def object_path(self, part: int) -> str:
        """Path in the store of the object that holds a part."""
        indices = [part, *[0] * (len(self.part_shape) - 1)]
        return f"{GROUP}/{self.name}/c/{'/'.join(map(str, indices))}"

    @property
    def metadata_path(self) -> str:
        return f"{GROUP}/{self.name}/zarr.json"

    def metadata(self, parts: int) -> dict[str, bytes]:
        """The `zarr.json` files that `parts` parts imply: of the groups, then of the array."""
        return _metadata(self, parts)


@functools.lru_cache(maxsize=256)  # specs are few
def _metadata(spec: ArraySpec, parts: int) -> dict[str, bytes]:
    memory = MemoryStore()
    zarr.create_array(
        memory,
        name=spec.name,
        shape=(parts * spec.part_shape[0], *spec.part_shape[1:]),
        chunks=spec.chunk_shape,
        shards=spec.part_shape if spec.chunk != spec.part_shape[0] else None,
        dtype=spec.dtype,
        compressors=[*_compressors(spec.codec), Crc32cCodec()],
        filters=None,
        fill_value=0,
        attributes=dict(spec.attributes),
    )
    files = {f"{GROUP}/{key}": value.to_bytes() for key, value in memory._store_dict.items()}
    return {**files, spec.metadata_path: files.pop(spec.metadata_path)}


def _compressors(codec: Codec) -> list[BloscCodec]:
    if codec == "none":
        return []
    return [BloscCodec(cname=codec, clevel=1, shuffle="bitshuffle")]
