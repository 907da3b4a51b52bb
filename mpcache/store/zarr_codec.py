"""The Zarr arrays of a store: their metadata, and a part's values <-> the bytes of its object.

Objects are made and read here, not through Zarr: several times faster. Tests hold that the bytes
are those that Zarr writes, and the values those that it reads.
"""

import functools
import itertools
import math
import sys
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

ReadInto = Callable[[int, Sequence[np.ndarray]], None]
"fills buffers, one after the other, with an object's bytes from an offset on"


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

    def ends(self, read: ReadInto, size: int) -> tuple[int, ...]:
        """The start of an object's first chunk and the end of each, given the object's bytes.

        Raises ValueError as `decode`.
        """
        count = self.part_shape[0] // self.chunk
        if count == 1:
            return 0, size
        begin = size - (_SPAN_BYTES * count + _CHECKSUM_BYTES)
        if begin < 0:
            raise ValueError(f"{size} bytes are too few for its index")
        index, checksum = _buffers(size - begin)
        read(begin, (index, checksum))
        _check(index, checksum)
        spans = index.view("<u8").reshape(count, 2)
        ends = (0, *itertools.accumulate(spans[:, 1].tolist()))
        if spans[:, 0].tolist() != list(ends[:-1]) or ends[-1] != begin:
            raise ValueError("its index does not name chunk after chunk")
        return ends

    def decode(
        self,
        read: ReadInto,
        ends: Sequence[int],
        start: int,
        stop: int,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Entries `start` to `stop` of an object, the inverse of `encode`: several times faster
        than through Zarr. Whole chunks that are not compressed are read right into their place.

        Gives `out`, of the array's type, filled, or new memory. Beside it takes the bytes of
        chunks that are compressed, and the values of those that are wanted in part.

        Raises ValueError or RuntimeError where the bytes are not what `encode` makes, or not as
        many entries as `out` has room for; what is in `out` is then anything.
        """
        shape = (max(0, stop - start), *self.part_shape[1:])
        if out is None:
            out = np.empty(shape, self.dtype)
        if out.shape != shape:
            raise ValueError(f"it has entries {shape}, not {out.shape}")
        first, last = start // self.chunk, -(-stop // self.chunk)
        sizes = [ends[n + 1] - ends[n] for n in range(first, last)]
        spans = [self._span(n, start, stop) for n in range(first, last)]
        # a chunk of which all is wanted has its place, another one is cut from memory of its own
        places = [out[into] for into, _ in spans]
        wholes = [
            place if len(place) == self.chunk else np.empty(self._chunk_shape, self.dtype)
            for place in places
        ]
        if self.codec == "none":
            self._read_plain(read, ends[first], sizes, wholes)
        else:
            self._read_packed(read, ends[first], sizes, wholes)
        for place, whole, (_, cut) in zip(places, wholes, spans, strict=True):
            if place is not whole:
                place[:] = whole[cut]
        if sys.byteorder == "big":
            out.byteswap(inplace=True)
        return out

    @property
    def _chunk_shape(self) -> tuple[int, ...]:
        return self.chunk, *self.part_shape[1:]

    def _span(self, chunk: int, start: int, stop: int) -> tuple[slice, slice]:
        """Where in entries `start` to `stop` a chunk's are, and which of the chunk's they are."""
        begin = chunk * self.chunk
        low, high = max(start, begin), min(stop, begin + self.chunk)
        return slice(low - start, high - start), slice(low - begin, high - begin)

    def _read_plain(
        self, read: ReadInto, begin: int, sizes: Sequence[int], chunks: Sequence[np.ndarray]
    ) -> None:
        checksums = [np.empty(_CHECKSUM_BYTES, np.uint8) for _ in chunks]
        for size, chunk in zip(sizes, chunks, strict=True):
            if size != chunk.nbytes + _CHECKSUM_BYTES:
                raise ValueError(f"a chunk has {size - _CHECKSUM_BYTES} bytes, not {chunk.nbytes}")
        pairs = list(zip(chunks, checksums, strict=True))
        read(begin, [one for pair in pairs for one in pair])
        for chunk, checksum in pairs:
            _check(chunk, checksum)

    def _read_packed(
        self, read: ReadInto, begin: int, sizes: Sequence[int], chunks: Sequence[np.ndarray]
    ) -> None:
        packed = [_buffers(size) for size in sizes]
        read(begin, [one for pair in packed for one in pair])
        for chunk, (data, checksum) in zip(chunks, packed, strict=True):
            _check(data, checksum)
            if _blosc_sizes(data) != (chunk.nbytes, len(data)):
                raise ValueError("a chunk decodes to another size")
            numcodecs.Blosc().decode(data, chunk)

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
    # NumPy does not tell Python 3.11 that its arrays are buffers
    value = checksums.crc32c(data)  # type: ignore[arg-type]
    return value.to_bytes(_CHECKSUM_BYTES, "little")


def _buffers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory for so many bytes that end with their checksum, and for that."""
    content = size - _CHECKSUM_BYTES
    if content < 0:
        raise ValueError(f"{size} bytes are too few for a checksum")
    return np.empty(content, np.uint8), np.empty(_CHECKSUM_BYTES, np.uint8)


def _check(content: np.ndarray, checksum: np.ndarray) -> None:
    if crc32c(content) != checksum.tobytes():
        raise ValueError("the stored checksum is another one")


def _blosc_sizes(data: np.ndarray) -> tuple[int, int]:
    """Decoded and encoded bytes, by Blosc's own header."""
    decoded, encoded = data[4:8].tobytes(), data[12:16].tobytes()
    return int.from_bytes(decoded, "little"), int.from_bytes(encoded, "little")


def _compressors(codec: Codec) -> list[BloscCodec]:
    if codec == "none":
        return []
    return [BloscCodec(cname=codec, clevel=1, shuffle="bitshuffle")]
