"""A store of documents run alone, in pieces: short parts, flags, and all that reads them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mpcache.collection.collect import collect
from mpcache.collection.summary import CollectSummary
from mpcache.config import ConvertConfig, RepairConfig
from mpcache.maintenance.convert import convert
from mpcache.maintenance.copy import copy
from mpcache.maintenance.repair import repair
from mpcache.maintenance.verify import verify
from mpcache.store.reader import Store, open_store
from mptrain.config.coder_grid import FitConfig
from mptrain.data.loader import Loader
from mptrain.runs.fit import fit
from tests.helpers.chats import chat_store
from tests.helpers.stores import SIDES, small_config, small_store

MLP = (("layers.1.mlp", "input"), ("layers.1.mlp", "output"))


@pytest.fixture(scope="module", params=["text", "chat"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make = small_store if request.param == "text" else chat_store
    path, summary = make(folder, one_document_per_sequence=True, bos="sequence")
    assert isinstance(summary, CollectSummary)
    return path


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return open_store(folder)


def test_parts_end_where_a_piece_ends(store: Store, folder: Path) -> None:
    rows = [store.tokens.token_count(part) for part in store.part_numbers("tokens")]
    assert any(count % store.ctx_len for count in rows)
    assert all(store.part_rows - store.ctx_len < n <= store.part_rows for n in rows[:-2])
    for side in SIDES:
        for split in ("train", "validation"):
            parts = store.parts([side], split)  # type: ignore[arg-type]
            assert [p.rows for p in parts] == [store.tokens.token_count(p.number) for p in parts]
    assert verify(folder).intact


def test_positions_are_those_in_a_piece(store: Store) -> None:
    for part in store.part_numbers("tokens"):
        positions, tokens = store.tokens.read_positions(part), store.tokens.read_token_ids(part)
        starts = store.tokens.read_document_starts(part)
        assert starts is not None
        assert int(positions.max()) < store.ctx_len
        assert int((positions == 0).sum()) == int(starts.sum())
        assert (tokens[positions == 0] == 256).all()
        assert (tokens[positions > 0] != 256).all()


def test_batches_leave_out_the_first_token_of_each_piece(store: Store, tmp_path: Path) -> None:
    config = FitConfig(
        store=str(store.storage), run=str(tmp_path / "run"), hookpoints=("layers.1.mlp",),
        k=(3,), expansion=(2,), rows=512, batch_rows=64, window_rows=128, arch=("topk",),
        device="cpu",
    )  # fmt: skip
    fit(config)
    with Loader(store, MLP, "train", batch_rows=100, row_fields=("token",)) as loader:
        batches = list(loader.one_pass())
    rows = sum(store.tokens.token_count(p.number) for p in store.parts(MLP, "train"))
    assert sum(batch.rows for batch in batches) == rows
    for batch in batches:
        assert ((batch.fields["token"] == 256) == (batch.positions_B == 0)).all()


def test_everything_is_repaired(folder: Path, tmp_path: Path, store: Store) -> None:
    if store.has_assistant:
        pytest.skip("the dataset of chats is known to its own test only")
    shutil.copytree(folder.parent, tmp_path / "all")
    path = tmp_path / "all/store"
    objects = (
        "arrays.zarr/tokens/c/0/0", "arrays.zarr/token_flags/c/0/0",
        "arrays.zarr/rows/position/c/0", "arrays.zarr/acts/layers.0/output/c/0/0",
    )  # fmt: skip
    before = {name: (path / name).read_bytes() for name in objects}
    for name in objects:
        data = bytearray(before[name])
        data[5] ^= 4
        (path / name).write_bytes(data)
    assert len(verify(path).findings) == len(objects)
    config = RepairConfig(
        model=str(folder.parent / "model"),
        dataset=str(folder.parent / "corpus.jsonl"),
        device="cpu",
    )
    assert repair(path, config).intact
    assert {name: (path / name).read_bytes() for name in objects} == before


def test_copies_and_conversions_keep_pieces(folder: Path, store: Store, tmp_path: Path) -> None:
    copy(folder, tmp_path / "copy")
    convert(folder, tmp_path / "new", ConvertConfig(dtype="float16", chunk_rows=64))
    for name in ("copy", "new"):
        other = open_store(tmp_path / name)
        assert verify(tmp_path / name).intact
        for part in store.part_numbers("tokens"):
            assert np.array_equal(other.tokens.read_flags(part), store.tokens.read_flags(part))  # type: ignore[arg-type]
            assert torch.equal(other.tokens.read_positions(part), store.tokens.read_positions(part))
    with pytest.raises(ValueError, match="its parts cannot be joined; keep part_rows="):
        convert(folder, tmp_path / "joined", ConvertConfig(part_rows=384))
    assert not (tmp_path / "joined").exists()


def test_more_rows_only_append(tmp_path: Path) -> None:
    small_store(tmp_path, one_document_per_sequence=True, rows=300)
    config = small_config(tmp_path, one_document_per_sequence=True)
    collect(config, tmp_path / "store")
    collect(config, tmp_path / "whole")
    more, at_once = open_store(tmp_path / "store"), open_store(tmp_path / "whole")
    assert more.part_numbers("tokens") == at_once.part_numbers("tokens")
    for array in at_once.arrays:
        for part in at_once.part_numbers(array):
            assert more.mark(part, array).objects == at_once.mark(part, array).objects
