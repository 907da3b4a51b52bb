"""Objects are encoded here as Zarr itself encodes them, byte for byte."""

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import LocalStore

from mpcache.format import GROUP, ArraySpec, mark_path, marked_array

shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(1, 9))


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
@given(shape=shapes, seed=st.integers(0, 99), zeros=st.booleans())
def test_bytes_equal_zarrs_own(tmp_path_factory, codec, dtype, shape, seed, zeros) -> None:
    chunks, chunk, axes, width = shape
    part_shape = (chunks * chunk, *[width] * axes)
    spec = ArraySpec(name="a/b", dtype=dtype, part_shape=part_shape, chunk=chunk, codec=codec)
    draw = np.random.default_rng(seed)
    values = (draw.integers(0, 200, part_shape) * (not zeros)).astype(dtype)
    folder = tmp_path_factory.mktemp("zarr")
    for name, data in spec.metadata(2).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    array = zarr.open_array(LocalStore(folder / GROUP), path="a/b", mode="r+")
    array.with_config({"write_empty_chunks": True})[len(values) :] = values
    file = folder / spec.object_path(1)
    assert file.read_bytes() == b"".join(spec.encode(values))


@pytest.mark.parametrize("array", ["tokens", "rows/position", "acts/layers.10.mlp/input"])
def test_a_marks_path_names_its_part_and_array(array: str) -> None:
    from pathlib import PurePosixPath

    assert marked_array(PurePosixPath(mark_path(12, array))) == (12, array)
