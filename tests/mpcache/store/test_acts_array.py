"""`store[...]` and `store.rows(...)` give the committed rows, equal to plain Zarr."""

import doctest
from pathlib import Path

import hypothesis
import pytest
import torch
import zarr
from hypothesis import strategies as st

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.store import acts_array, reader
from mpcache.store.reader import Store, open_store
from tests.helpers.damage import flip
from tests.helpers.stores import small_store

SIDE = "layers.1.mlp:output"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose last parts are short, in bfloat16."""
    return small_store(tmp_path_factory.mktemp("made"), rows=1_000_000, dtype="bfloat16")[0]


@pytest.fixture(scope="module")
def store(path: Path) -> Store:
    return open_store(path)


@pytest.fixture(scope="module")
def rows(path: Path, store: Store) -> torch.Tensor:
    """All true rows, read through Zarr alone."""
    array = zarr.open_group(path / "arrays.zarr", mode="r")["acts/layers.1.mlp/output"]
    assert isinstance(array, zarr.Array)
    stored = torch.from_numpy(array[:]).view(torch.bfloat16)
    size = store.part_rows
    parts = store.parts([("layers.1.mlp", "output")], None)
    assert any(part.rows < size for part in parts)
    return torch.cat([stored[p.number * size : p.number * size + p.rows] for p in parts])


def test_the_array_is_what_zarr_reads(store: Store, rows: torch.Tensor) -> None:
    acts = store[SIDE]
    assert acts.dtype == acts[:1].dtype == torch.bfloat16
    assert acts.shape == tuple(rows.shape)
    assert len(acts) == len(rows)
    assert torch.equal(acts[:], rows)
    assert "layers.1.mlp:output" in repr(acts)


@hypothesis.given(st.slices(2000))
@hypothesis.settings(deadline=None, max_examples=50)
def test_slices(store: Store, rows: torch.Tensor, key: slice) -> None:
    wanted = torch.tensor(range(len(rows))[key], dtype=torch.long)
    assert torch.equal(store[SIDE][key], rows[wanted])


def test_single_rows(store: Store, rows: torch.Tensor) -> None:
    acts = store[SIDE]
    for row in (0, 1, 191, 192, len(rows) - 1, -1, -len(rows)):
        assert torch.equal(acts[row], rows[row])
    for row in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match="out of range"):
            acts[row]


@pytest.mark.parametrize("split", ["train", "validation", None])
def test_rows_of_a_split_come_chunk_by_chunk(store: Store, split: str | None) -> None:
    pieces = list(store.rows(SIDE, split=split))  # type: ignore[arg-type]
    parts = store.parts([("layers.1.mlp", "output")], split)  # type: ignore[arg-type]
    chunks = [
        store.acts.read_chunk("layers.1.mlp", "output", part.number, chunk)
        for part in parts
        for chunk in range(-(-part.rows // store.chunk_rows))
    ]
    assert sum(map(len, pieces)) == sum(part.rows for part in parts) > 0
    assert max(map(len, pieces)) <= store.chunk_rows
    assert torch.equal(torch.cat(pieces), torch.cat(chunks))


def test_a_side_may_be_left_out_where_there_is_one(tmp_path: Path) -> None:
    path, _ = small_store(tmp_path, rows=400, hookpoints=("layers.0", "layers.1.mlp"))
    store = open_store(path)
    assert torch.equal(store["layers.0"][:5], store["layers.0:output"][:5])
    with pytest.raises(UsageError, match=r"write layers\.1\.mlp:input or layers\.1\.mlp:output"):
        store["layers.1.mlp"]


def test_unknown_names_are_answered_with_what_there_is(store: Store) -> None:
    with pytest.raises(UsageError, match=r"no hookpoint 'layers\.9'; use one of: .*layers\.1\.mlp"):
        store["layers.9:output"]
    for side in ("outputs", ""):
        with pytest.raises(
            UsageError, match=r"input or output, got .*; layers\.0 has layers\.0:out"
        ):
            store.rows(f"layers.0:{side}")
    with pytest.raises(
        UsageError, match=r"no input of layers\.0, only its output; collect the input with"
    ):
        store["layers.0:input"]
    with pytest.raises(UsageError, match=r"named as HOOKPOINT:SIDE, got 0; .* layers\.1\.mlp"):
        store[0]  # type: ignore[index]
    for key in ("a", 1.5, [1, 2]):
        with pytest.raises(TypeError, match="by an integer or a slice, got"):
            store[SIDE][key]  # type: ignore[index]
    with pytest.raises(UsageError, match="split must be train or validation, got 'test'"):
        store.rows(SIDE, split="test")  # type: ignore[arg-type]


def test_damage_is_found(tmp_path: Path) -> None:
    path, _ = small_store(tmp_path, rows=400, hookpoints=("layers.0",))
    flip(path / "arrays.zarr/acts/layers.0/output/c/2/0", 8)
    store = open_store(path)
    with pytest.raises(DamagedStoreError, match="c/2/0 is damaged"):
        list(store.rows("layers.0:output"))
    assert len(store["layers.0:output"][:192]) == 192


@pytest.mark.parametrize("module", [acts_array, reader])
def test_examples_run_in_a_folder_with_a_store(
    module: object, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(module, extraglobs={"open_store": open_store})  # type: ignore[arg-type]
    assert result.attempted >= 3
    assert result.failed == 0
