"""With one document a sequence, rows are those of each document alone, for every reader."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from mpcache.collection.collect import collect
from mpcache.config import RepairConfig
from mpcache.maintenance.repair import repair
from mpcache.maintenance.verify import verify
from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hooks import Capture
from mpcache.model.loading import load_model
from mpcache.model.splice import SplicedModel
from mpcache.parallel.config import CollectParallelConfig
from mpcache.store.reader import Store, open_store
from tests.helpers.damage import flip
from tests.helpers.models import save_tiny
from tests.helpers.stores import files_of, marks_of, small_config, small_store

LONE = {"one_document_per_sequence": True, "dtype": "float32"}
KINDS = {"llama": ("layers.0", "layers.1.mlp"), "bert": ("encoder.layer.0", "encoder.layer.1")}


def make_store(folder: Path, name: str = "llama", **changes: object) -> Store:
    save_tiny(folder / "model", name)
    path, _ = small_store(folder, hookpoints=KINDS[name], **(LONE | changes))
    return open_store(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lone")
    make_store(folder)
    return folder


def pieces_of(store: Store, part: int) -> list[np.ndarray]:
    starts = store.tokens.read_document_starts(part)
    assert starts is not None
    tokens = store.tokens.read_tokens(part).reshape(-1)[: store.tokens.token_count(part)]
    return np.split(tokens, np.flatnonzero(starts.reshape(-1)[: len(tokens)])[1:])


def alone(store: Store, folder: Path, part: int, sides: tuple[Side, ...]) -> dict[Side, Tensor]:
    """A slow reference: each piece in a separate forward pass, in the order of tokens."""
    model, _ = load_model(small_config(folder, hookpoints=("x",), **LONE))
    rows: dict[Side, list[Tensor]] = {side: [] for side in sides}
    with Capture(model, sides) as capture:
        for piece in pieces_of(store, part):
            ids = torch.from_numpy(piece.astype(np.int64))[None]
            capture.run({"input_ids": ids}, lambda side, x: rows[side].append(x[0].clone()))
    return {side: torch.cat(values) for side, values in rows.items()}


@pytest.mark.parametrize(("name", "batch_sequences"), [("llama", 1), ("llama", 5), ("bert", 5)])
def test_rows_are_those_of_each_piece_alone(
    tmp_path: Path, name: str, batch_sequences: int
) -> None:
    store = make_store(tmp_path, name, batch_sequences=batch_sequences, rows=400)
    model, _ = load_model(small_config(tmp_path, hookpoints=("x",), **LONE))
    sides = resolve_sides(KINDS[name], model)
    for part in store.part_numbers("tokens"):
        assert {len(piece) for piece in pieces_of(store, part)} > {16}, "short ones too"
        token_of_row = (
            store.tokens.read_sequences(part) - part * store.layout.part_sequences
        ) * store.ctx_len + torch.from_numpy(
            store.read_part("rows/position", part)["rows/position"].astype(np.int64)
        )
        assert sorted(token_of_row) == list(range(store.tokens.token_count(part)))
        for side, rows in alone(store, tmp_path, part, sides).items():
            chunks = -(-len(rows) // store.chunk_rows)
            stored = torch.cat(
                [store.acts.read_chunk(side.hookpoint, side.side, part, n) for n in range(chunks)]
            )
            torch.testing.assert_close(stored, rows[token_of_row], rtol=1e-4, atol=1e-5)


def test_whether_documents_may_mix_makes_no_difference(folder: Path, tmp_path: Path) -> None:
    config = small_config(folder, hookpoints=KINDS["llama"], **LONE, cross_document_attention=False)
    collect(config, tmp_path / "store")
    apart, store = open_store(tmp_path / "store"), open_store(folder / "store")
    assert apart.fingerprint == store.fingerprint
    arrays = {name: data for name, data in files_of(tmp_path / "store").items() if "/c/" in name}
    assert arrays.items() <= files_of(folder / "store").items()


def test_a_repaired_store_has_the_same_bits(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder / "store", tmp_path / "store"))
    flip(path / "arrays.zarr/acts/layers.1.mlp/output/c/2/0", 8)
    flip(path / "arrays.zarr/rows/position/c/0", 8)
    assert not verify(path).intact
    assert repair(path, RepairConfig()).intact
    assert files_of(path) == files_of(folder / "store")


# sockets of Dask's scheduler that it leaves to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_a_worker_collects_the_same_bits(folder: Path, tmp_path: Path) -> None:
    config = small_config(folder, hookpoints=KINDS["llama"], **LONE)
    collect(config, tmp_path / "store", CollectParallelConfig(workers=1))
    assert files_of(tmp_path / "store") == files_of(folder / "store")
    assert marks_of(tmp_path / "store") == marks_of(folder / "store")


def test_the_language_model_reads_each_piece_alone(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    save_tiny(tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    path, _ = small_store(tmp_path, hookpoints=KINDS["llama"], **LONE)
    spliced, store = SplicedModel(path, str(tmp_path / "model"), "main", "cpu"), open_store(path)
    pieces = [
        piece
        for part in store.part_numbers("tokens")
        if store.layout.split_of(part) == "validation"
        for piece in pieces_of(store, part)
        if len(piece) > 1
    ]
    inputs = [example.inputs for example in spliced.examples()]
    assert [batch["input_ids"][0].tolist() for batch in inputs] == [
        piece.tolist() for piece in pieces
    ]
    assert all(list(batch) == ["input_ids"] for batch in inputs)
