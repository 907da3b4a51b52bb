"""Our encoding of objects equals Zarr's byte for byte, and so does the decoding."""

import itertools
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore

from mpcache.config import Codec
from mpcache.store.array_spec import GROUP, ArraySpec
from mpcache.store.object_paths import mark_path, parse_mark_path
from mpcache.store.zarr_codec import ReadInto, crc32c, decode_part, encode_part, read_chunk_ends

shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(1, 9))


CODECS = pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
DTYPES = pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])


def spec_of(shape: tuple[int, ...], dtype: str, codec: Codec) -> ArraySpec:
    chunks, chunk, axes, width = shape
    part_shape = (chunks * chunk, *[width] * axes)
    return ArraySpec(name="a/b", dtype=dtype, part_shape=part_shape, chunk=chunk, codec=codec)


def draw_values(spec: ArraySpec, seed: int, zeros: bool) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.integers(0, 200, spec.part_shape) * (not zeros)).astype(spec.dtype)


def reader_of(data: bytes) -> ReadInto:
    def read(offset: int, buffers: Sequence[np.ndarray]) -> None:
        for buffer in buffers:
            buffer.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)[offset:][
                : buffer.nbytes
            ]
            offset += buffer.nbytes

    return read


def decoded(spec: ArraySpec, data: bytes, start: int, stop: int) -> np.ndarray:
    read = reader_of(data)
    return decode_part(spec, read, read_chunk_ends(spec, read, len(data)), start, stop)


def open_zarr(spec: ArraySpec, folder: Path, mode: Literal["r", "r+"]) -> Any:
    for name, data in spec.metadata(2).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return zarr.open_array(LocalStore(folder / GROUP), path="a/b", mode=mode)


@CODECS
@DTYPES
@given(shape=shapes, seed=st.integers(0, 99), zeros=st.booleans())
def test_bytes_equal_zarrs_own(tmp_path_factory, codec, dtype, shape, seed, zeros) -> None:
    spec = spec_of(shape, dtype, codec)
    values = draw_values(spec, seed, zeros)
    folder = tmp_path_factory.mktemp("zarr")
    array = open_zarr(spec, folder, "r+")
    array.with_config({"write_empty_chunks": True})[len(values) :] = values
    file = folder / spec.object_path(1)
    assert file.read_bytes() == b"".join(encode_part(spec, values))


@CODECS
@DTYPES
@settings(max_examples=20)
@given(shape=shapes, seed=st.integers(0, 99), zeros=st.booleans(), data=st.data())
def test_reads_what_zarr_reads(tmp_path_factory, codec, dtype, shape, seed, zeros, data) -> None:
    spec = spec_of(shape, dtype, codec)
    encoded = b"".join(encode_part(spec, draw_values(spec, seed, zeros)))
    folder = tmp_path_factory.mktemp("zarr")
    array = open_zarr(spec, folder, "r")
    file = folder / spec.object_path(1)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded)
    rows = spec.part_shape[0]
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    actual = decoded(spec, encoded, start, stop)
    expected = array[rows + start : rows + stop]
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()
    assert actual.flags.writeable, "torch warns of an array that is not"


@CODECS
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (4, 8), (0, 4), (8, 11), (2, 9)])
def test_values_are_put_where_they_are_wanted(codec: Codec, start: int, stop: int) -> None:
    spec = spec_of((3, 4, 1, 5), "uint16", codec)
    values = draw_values(spec, 1, zeros=False)
    read = reader_of(b"".join(encode_part(spec, values)))
    ends = read_chunk_ends(spec, read, len(b"".join(encode_part(spec, values))))
    larger = np.full((20, 5), 7, np.uint16)
    out = larger[3 : 3 + stop - start]
    assert decode_part(spec, read, ends, start, stop, out) is out
    assert (out == values[start:stop]).all()
    assert (larger[:3] == 7).all()
    assert (larger[3 + stop - start :] == 7).all()
    with pytest.raises(ValueError, match="entries"):
        decode_part(spec, read, ends, start, stop, larger)


@CODECS
@pytest.mark.parametrize("chunks", [1, 3])
def test_any_changed_byte_is_refused(codec: Codec, chunks: int) -> None:
    spec = spec_of((chunks, 4, 1, 5), "uint16", codec)
    encoded = b"".join(encode_part(spec, draw_values(spec, 0, zeros=False)))
    for index in range(len(encoded)):
        changed = bytearray(encoded)
        changed[index] ^= 1 << index % 8
        with pytest.raises(ValueError, match="does not match"):
            decoded(spec, bytes(changed), 0, spec.part_shape[0])


def forged(spec: ArraySpec, *chunks: bytes, spans: list[tuple[int, int]] | None = None) -> bytes:
    """An object with valid checksums."""
    sealed = [chunk + crc32c(chunk) for chunk in chunks]
    ends = list(itertools.accumulate(map(len, sealed), initial=0))
    spans = spans or list(zip(ends, map(len, sealed), strict=False))
    index = np.array(spans, "<u8").tobytes()
    return b"".join(sealed) + index + crc32c(index)


@pytest.mark.parametrize(
    ("chunks", "spans", "message"),
    [
        ((b"1234", b"56"), None, "2 bytes, not 4"),
        ((b"1234", b"5678"), [(0, 8), (0, 8)], "gaps or overlap"),
        ((b"1234", b"5678"), [(0, 8), (8, 1 << 40)], "gaps or overlap"),
        ((b"1234", b"5678"), [(0, 2**64 - 8), (2**64 - 8, 24)], "gaps or overlap"),
    ],
)
def test_what_no_writer_makes_is_refused(
    chunks: tuple[bytes, ...], spans: list[tuple[int, int]] | None, message: str
) -> None:
    spec = spec_of((2, 4, 0, 1), "uint8", "none")
    data = forged(spec, *chunks, spans=spans)
    with pytest.raises(ValueError, match=message):
        decoded(spec, data, 0, 8)


@pytest.mark.parametrize("chunk", [b"", b"short", numcodecs.Blosc("lz4").encode(b"12345")])
def test_a_compressed_chunk_of_another_size_is_refused(chunk: bytes) -> None:
    spec = spec_of((2, 4, 0, 1), "uint8", "lz4")
    data = forged(spec, chunk, chunk)
    with pytest.raises(ValueError, match="wrong size after decompression"):
        decoded(spec, data, 0, 8)


def test_an_object_without_room_for_its_index_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        decoded(spec_of((2, 4, 0, 1), "uint8", "none"), b"12345", 0, 8)


@pytest.mark.parametrize("array", ["tokens", "rows/position", "acts/layers.10.mlp/input"])
def test_a_marks_path_names_its_part_and_array(array: str) -> None:
    assert parse_mark_path(PurePosixPath(mark_path(12, array))) == (12, array)
