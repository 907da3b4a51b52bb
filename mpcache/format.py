"""Store format, version 1: every name, path, array and file form of a store is decided here.

    STORE/store.json                              what the store is made from, sealed
    STORE/arrays.zarr/<array>                     one Zarr v3 group
    STORE/marks/<part>/<array>.json               commit mark of one array's part, sealed

A mark's array is `tokens`, `rows/sequence`, `rows/position` or `acts/<hookpoint>/<side>`; the last
has two companions, `norms/...` and `moments/...`, that are committed by the same mark.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from mpcache.config import Codec, Split, split_of

FORMAT_VERSION = 1
STORE_FILE = "store.json"
GROUP = "arrays.zarr"
MARKS = "marks"
TOKENS = "tokens"
SEQUENCE = "rows/sequence"
POSITION = "rows/position"
_CHECKSUM_BYTES = 4
ZARR_DTYPE = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}

Sealed = dict[str, Any]


class DamagedStoreError(OSError):
    """Something in a store is not what was committed; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a store cuts rows into parts, chunks and sequences. Fixed when the store is made."""

    ctx_len: int
    part_rows: int
    chunk_rows: int
    validation_every: int
    dtype: str
    codec: Codec
    token_dtype: str

    @property
    def part_sequences(self) -> int:
        return self.part_rows // self.ctx_len

    def split_of(self, part: int) -> Split:
        return split_of(part, self.validation_every)


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

    def decode(self, data: bytes) -> np.ndarray:
        """The values of one part back from its object; the inverse of `encode`.

        Raises DamagedStoreError for anything that `encode` does not write.
        """
        spans = np.array([[0, len(data)]])
        if self.chunk < self.part_shape[0]:
            size = 16 * (self.part_shape[0] // self.chunk) + _CHECKSUM_BYTES
            index = np.frombuffer(_checked(data[-size:]), "<u8")
            spans = index.astype(np.int64).reshape(-1, 2)
        try:
            pieces = [self._decode_chunk(_checked(data[start : start + n])) for start, n in spans]
            return np.concatenate(pieces).reshape(self.part_shape)
        except (ValueError, RuntimeError) as error:
            raise DamagedStoreError(f"an object of {self.name} is damaged: {error}") from error

    def _decode_chunk(self, data: bytes) -> np.ndarray:
        plain = data if self.codec == "none" else numcodecs.Blosc(self.codec).decode(data)
        return np.frombuffer(plain, np.dtype(self.dtype).newbyteorder("<"))

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


def check_metadata(path: Path, spec: ArraySpec) -> int:
    """Compare an array's `zarr.json` with what the layout implies; gives the parts it spans."""
    file = path / spec.metadata_path
    try:
        data = file.read_bytes()
        found = json.loads(data)
        parts, rest = divmod(found["shape"][0], spec.part_shape[0])
        implied = json.loads(spec.metadata(parts)[spec.metadata_path])
    except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DamagedStoreError(f"{file} is damaged or missing: {error}") from error
    # spelled again as Zarr spells it: a changed blank would otherwise go unseen
    spellings = {json.dumps(found, indent=indent).encode() for indent in (None, 2)}
    if rest or found != implied or data not in spellings:
        raise DamagedStoreError(f"{file} is damaged: it is not what {path} needs")
    return int(parts)


def crc32c(data: bytes) -> bytes:
    """The checksum that Zarr's `crc32c` codec puts behind data."""
    return int(google_crc32c.value(data)).to_bytes(_CHECKSUM_BYTES, "little")


def _checked(data: bytes) -> bytes:
    """Data without the checksum behind it, which must be right."""
    if crc32c(data[:-_CHECKSUM_BYTES]) != data[-_CHECKSUM_BYTES:]:
        raise DamagedStoreError("a checksum does not match its data")
    return data[:-_CHECKSUM_BYTES]


def _compressors(codec: Codec) -> list[BloscCodec]:
    if codec == "none":
        return []
    return [BloscCodec(cname=codec, clevel=1, shuffle="bitshuffle")]


def acts(hookpoint: str, side: str) -> str:
    """Name of the array that holds one side of a hookpoint."""
    return f"acts/{hookpoint}/{side}"


def hookpoint_of(array: str) -> tuple[str, str]:
    """Hookpoint and side of an `acts` array."""
    _, hookpoint, side = array.split("/")
    return hookpoint, side


def specs(array: str, layout: Layout, width: int = 0) -> tuple[ArraySpec, ...]:
    """The Zarr arrays that one mark commits; `width` is that of an `acts` array."""
    if array == TOKENS:
        shape = (layout.part_sequences, layout.ctx_len)
        return (ArraySpec(name=TOKENS, dtype=layout.token_dtype, part_shape=shape, chunk=shape[0]),)
    rows, chunk = layout.part_rows, layout.chunk_rows
    if array in (SEQUENCE, POSITION):
        return (ArraySpec(name=array, dtype="uint32", part_shape=(rows,), chunk=chunk),)
    place = array.removeprefix("acts/")
    return (
        ArraySpec(
            name=array,
            dtype=ZARR_DTYPE[layout.dtype],
            part_shape=(rows, width),
            chunk=chunk,
            codec=layout.codec,
            attributes=(("logical_dtype", layout.dtype),),
        ),
        ArraySpec(name=f"norms/{place}", dtype="float32", part_shape=(rows,), chunk=rows),
        ArraySpec(name=f"moments/{place}", dtype="float64", part_shape=(1, 2, width), chunk=1),
    )


def mark_path(part: int, array: str) -> str:
    """Path in the store of the mark of one array's part."""
    return f"{MARKS}/{part}/{array.removeprefix('acts/')}.json"


def marked_array(path: PurePosixPath) -> tuple[int, str]:
    """Part and array of a mark's path; the inverse of `mark_path`."""
    _, part, *place = path.with_name(path.name.removesuffix(".json")).parts
    array = "/".join(place)
    return int(part), array if array in (TOKENS, SEQUENCE, POSITION) else f"acts/{array}"


def canonical(content: Sealed) -> bytes:
    """The one spelling of a JSON file of ours."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def digest(content: Sealed) -> str:
    """SHA-256 over the canonical spelling, in hexadecimal."""
    return hashlib.sha256(canonical(content)).hexdigest()


def seal(content: Sealed) -> bytes:
    """JSON with a digest of itself."""
    return canonical({**content, "digest": digest(content)})


def unseal(data: bytes, name: str) -> Sealed:
    """Content of sealed JSON, which must be spelled exactly as `seal` spells it."""
    try:
        content: Sealed = json.loads(data)
        claimed = content.pop("digest")
        intact = claimed == digest(content) and seal(content) == data
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise DamagedStoreError(f"{name} is damaged: its content does not match its own digest")
    return content


def is_store(path: Path) -> bool:
    """Whether a store was made there."""
    return (path / STORE_FILE).exists()


def read_store_file(path: Path) -> Sealed:
    """Content of `store.json`; refuses what is no store and an unknown format version."""
    file = path / STORE_FILE
    if not is_store(path):
        raise ValueError(
            f"{path} is no store: it has no {STORE_FILE}; fill one with mpcache collect"
        )
    data = file.read_bytes()
    refuse_unknown_version(data, file)
    return unseal(data, str(file))


def refuse_unknown_version(data: bytes, file: Path) -> None:
    # looked at before the seal: a later version may be sealed in another way
    try:
        version = json.loads(data)["format_version"]
    except (ValueError, KeyError, TypeError):
        return  # no version to speak of: the seal will say that it is damaged
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}, this mpcache reads version {FORMAT_VERSION}; "
            "use the mpcache that made it"
        )
