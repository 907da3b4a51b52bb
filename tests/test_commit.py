"""What a writer finds in its way: objects that nobody marked, and others who write beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcache.collect import Collection, collect
from mpcache.format import ArraySpec, DamagedStoreError, specs
from mpcache.reader import open_store
from mpcache.verify import verify
from mpcache.writer import Writer
from stores import files_of, marks_of, small_config, small_store

ARRAY = "acts/layers.0/output"
OBJECT = "arrays.zarr/acts/layers.0/output/c/2/0"
MARK = "marks/2/layers.0/output.json"


@given(
    codec=st.sampled_from(["none", "lz4", "zstd"]),
    dtype=st.sampled_from(["uint16", "uint32", "float32", "float64"]),
    chunks=st.integers(1, 5),
    chunk=st.integers(1, 9),
    width=st.integers(1, 7),
    seed=st.integers(0, 9),
)
def test_decode_undoes_encode(codec, dtype, chunks, chunk, width, seed) -> None:
    shape = (chunks * chunk, width)
    spec = ArraySpec(name="a", dtype=dtype, part_shape=shape, chunk=chunk, codec=codec)
    values = np.random.default_rng(seed).integers(0, 9, shape).astype(dtype)
    data = b"".join(spec.encode(values))
    assert np.array_equal(spec.decode(data), values)
    for damaged in (b"", data[:-1], data[:3] + bytes([data[3] ^ 4]) + data[4:], data + b"x"):
        with pytest.raises(DamagedStoreError):
            spec.decode(damaged)


def rows_of(path: Path) -> torch.Tensor:
    store = open_store(path)
    chunks = [store.read_chunk("layers.0", "output", 2, chunk) for chunk in range(6)]
    return torch.cat(chunks)


def put(path: Path, x_RW: torch.Tensor) -> bytes:
    """Another machine's object in the place of part 2, not marked."""
    spec, *_ = specs(ARRAY, open_store(path).layout, x_RW.shape[1])
    data = b"".join(spec.encode(x_RW.view(torch.uint16).numpy()))
    (path / OBJECT).write_bytes(data)
    (path / MARK).unlink()
    return data


def test_what_another_machine_wrote_stays_and_is_what_the_mark_describes(tmp_path: Path) -> None:
    """It may be about to mark it, and reads what it wrote: nobody writes it over."""
    path, _ = small_store(tmp_path)
    ours = rows_of(path)
    theirs = (ours.double() * (1 + 0.01 * torch.randn(ours.shape))).bfloat16()
    data = put(path, theirs)
    assert small_store(tmp_path)[1].forward_rows == 192
    assert (path / OBJECT).read_bytes() == data
    assert torch.equal(rows_of(path), theirs)
    assert not torch.equal(theirs, ours)
    assert not verify(path).findings
    norms = open_store(path).read_part(ARRAY, 2)["norms/layers.0/output"]
    assert np.allclose(norms, theirs.double().norm(dim=1), rtol=0.02)


@pytest.mark.parametrize("harm", ["flipped", "truncated", "empty", "other", "nonfinite"])
def test_what_nobody_can_have_meant_is_written_over(tmp_path: Path, harm: str) -> None:
    """How a damaged part is mended: delete its mark, and collect again."""
    path, _ = small_store(tmp_path)
    before, files = marks_of(path), files_of(path)
    rows = rows_of(path)
    data = put(path, -rows if harm == "other" else rows.masked_fill(rows > 1, torch.nan))
    if harm == "flipped":
        (path / OBJECT).write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
    elif harm in ("truncated", "empty"):
        (path / OBJECT).write_bytes(data[: -7 if harm == "truncated" else 0])
    small_store(tmp_path)
    assert marks_of(path) == before
    assert files_of(path) == files


def test_what_is_marked_is_not_written_over_whatever_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = small_store(tmp_path)
    rows, store = rows_of(path), open_store(path)
    files, mark = files_of(path), (path / MARK).read_bytes()
    (path / MARK).unlink()
    decode = ArraySpec.decode

    def marked_meanwhile(self: ArraySpec, data: bytes) -> np.ndarray:
        (path / MARK).write_bytes(mark)
        return decode(self, data)

    monkeypatch.setattr(ArraySpec, "decode", marked_meanwhile)
    with pytest.raises(DamagedStoreError, match="another collection committed other values"):
        Writer(path, store.layout).commit_acts(2, ARRAY, -rows)
    assert files_of(path) == files
    assert not verify(path).findings


def test_arrays_span_the_same_parts_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that grow an array at the same moment, the one that wants less may come last."""
    config, path = small_config(tmp_path), tmp_path / "store"
    settle = Collection.settle

    def shrunk(self: Collection) -> None:
        for spec in specs(ARRAY, self.layout, 16)[:2]:
            (path / spec.metadata_path).write_bytes(spec.metadata(3)[spec.metadata_path])
        assert verify(path).findings
        settle(self)

    monkeypatch.setattr(Collection, "settle", shrunk)
    collect(config, path)
    assert not verify(path).findings


def test_a_store_that_was_made_while_we_looked_is_no_foreign_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = small_config(tmp_path), tmp_path / "store"
    collect(config, path)
    looks = iter([False])
    there = "mpcache.identity.is_store"
    monkeypatch.setattr(there, lambda _: next(looks, True))
    assert collect(config, path).forward_rows == 0
