"""The Zarr arrays of a store: their metadata, and a part's values <-> the bytes of its object.

Objects are made and read here, not through Zarr: several times faster. Tests hold that the bytes
are those that Zarr writes, and the values those that it reads.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import crc32c as checksums
import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from mpcache.config import Codec

GROUP = "arrays.zarr"
_CHECKSUM_BYTES = 4
_STEP_BYTES = 8 << 20
_SPAN_BYTES = 16  # offset and length of a chunk, in a shard's index

ReadRange = Callable[[int, int], np.ndarray]
"so many bytes of an object from an offset on, as `uint8` that may be written to"


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One Zarr array: a part is one object (a shard, or a lone chunk) along the first axis."""

    name: str
    dtype: str
    part_shape: tuple[int, ...]
    chunk: int
    codec: Codec = "none"
    attributes: tuple[tuple[str, str], ...] = field(default=())

    def encode(self, values: np.ndarray) -> Iterator[bytes]:
        """The object that holds one part, `part_shape` values, byte for byte as Zarr writes it.

        Comes in pieces that stay in the processor's cache, and is made in the caller's thread
        alone: several times faster than through Zarr. Never leaves out what is all zeros.
        """
        ends = [0]
        for piece in np.split(values, range(self.chunk, self.part_shape[0], self.chunk)):
            data = self._encode_chunk(piece)
            ends.append(ends[-1] + len(data) + _CHECKSUM_BYTES)
            yield data
            yield crc32c(data)
        if self.chunk < self.part_shape[0]:  # a shard ends with the index of its chunks
            spans = np.stack([ends[:-1], np.diff(ends)], axis=1)
            index = spans.astype("<u8").tobytes()
            yield index
            yield crc32c(index)

    def _encode_chunk(self, values: np.ndarray) -> bytes:
        little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
        if self.codec == "none":
            return little.tobytes()
        # bit shuffle gathers the exponent bits of neighbouring values: that is what compresses here
        blosc = numcodecs.Blosc(self.codec, clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE)
        return bytes(blosc.encode(little))

    def ends(self, read: ReadRange, size: int) -> tuple[int, ...]:
        """The start of an object's first chunk and the end of each, given the object's bytes.

        Raises ValueError as `decode`.
        """
        count = self.part_shape[0] // self.chunk
        if count == 1:
            return 0, size
        begin = size - (_SPAN_BYTES * count + _CHECKSUM_BYTES)
        if begin < 0:
            raise ValueError(f"{size} bytes are too few for its index")
        spans = _checked(read(begin, size - begin)).view("<u8").reshape(count, 2)
        ends = (0, *itertools.accumulate(spans[:, 1].tolist()))
        if spans[:, 0].tolist() != list(ends[:-1]) or ends[-1] != begin:
            raise ValueError("its index does not name chunk after chunk")
        return ends

    def decode(self, read: ReadRange, ends: Sequence[int], start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop` of an object, the inverse of `encode`: several times faster
        than through Zarr.

        Memory: the bytes of the chunks that hold them, and once more their values if these are
        compressed, or are several chunks.

        Raises ValueError or RuntimeError where the bytes are not what `encode` makes.
        """
        first, last = start // self.chunk, -(-stop // self.chunk)
        data = read(ends[first], ends[last] - ends[first])
        chunks = [
            self._decode_chunk(data[ends[n] - ends[first] : ends[n + 1] - ends[first]])
            for n in range(first, last)
        ]
        values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        return values[start - first * self.chunk : stop - first * self.chunk]

    def _decode_chunk(self, data: np.ndarray) -> np.ndarray:
        data = _checked(data)
        shape, dtype = (self.chunk, *self.part_shape[1:]), np.dtype(self.dtype)
        size = math.prod(shape) * dtype.itemsize
        if self.codec != "none":
            if _blosc_sizes(data) != (size, len(data)):
                raise ValueError("a chunk decodes to another size")
            data = numcodecs.Blosc().decode(data, np.empty(size, np.uint8))
        if len(data) != size:
            raise ValueError(f"a chunk has {len(data)} bytes, not {size}")
        little = data.view(dtype.newbyteorder("<")).reshape(shape)
        return little.astype(dtype, copy=False)

    def steps(self, length: int) -> Iterator[tuple[int, int]]:
        """The first `length` entries as spans of whole chunks, 8 MB or so at a time."""
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

    @functools.lru_cache(maxsize=256)  # noqa: B019  specs are few and live as long as the process
    def metadata(self, parts: int) -> dict[str, bytes]:
        """The `zarr.json` files, of the array and the groups above it, that `parts` parts imply."""
        memory = MemoryStore()
        zarr.create_array(
            memory,
            name=self.name,
            shape=(parts * self.part_shape[0], *self.part_shape[1:]),
            chunks=(self.chunk, *self.part_shape[1:]),
            shards=self.part_shape if self.chunk != self.part_shape[0] else None,
            dtype=self.dtype,
            compressors=[*_compressors(self.codec), Crc32cCodec()],
            filters=None,
            fill_value=0,
            attributes=dict(self.attributes),
        )
        files = {f"{GROUP}/{key}": value.to_bytes() for key, value in memory._store_dict.items()}
        return {**files, self.metadata_path: files.pop(self.metadata_path)}  # groups come first


def crc32c(data: bytes | np.ndarray) -> bytes:
    """The checksum that Zarr's `crc32c` codec puts behind data."""
    return int(checksums.crc32c(data)).to_bytes(_CHECKSUM_BYTES, "little")


def _checked(data: np.ndarray) -> np.ndarray:
    """Bytes without the checksum at their end, once it was compared."""
    content, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if crc32c(content) != checksum.tobytes():
        raise ValueError("the stored checksum is another one")
    return content


def _blosc_sizes(data: np.ndarray) -> tuple[int, int]:
    """Decoded and encoded bytes, by Blosc's own header."""
    decoded, encoded = data[4:8].tobytes(), data[12:16].tobytes()
    return int.from_bytes(decoded, "little"), int.from_bytes(encoded, "little")


def _compressors(codec: Codec) -> list[BloscCodec]:
    if codec == "none":
        return []
    return [BloscCodec(cname=codec, clevel=1, shuffle="bitshuffle")]
