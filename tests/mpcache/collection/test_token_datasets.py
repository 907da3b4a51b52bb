"""A model without a tokenizer and a dataset of token ids: from collection to repair."""

import json
import shutil

import numpy as np
import pytest

from mpcache.collection import collect as collect_module
from mpcache.collection.collect import collect
from mpcache.collection.find_store import find_store
from mpcache.config import CollectConfig, RepairConfig
from mpcache.maintenance.repair import repair
from mpcache.storage.base import open_storage
from mpcache.store.object_paths import TOKENS
from mpcache.store.reader import open_store
from mpcache.store.store_metadata import read_store_file
from tests.helpers.models import save_tiny, tiny_model

END = 2  # LlamaConfig's own
SIZES = {"ctx_len": 16, "part_rows": 64, "chunk_rows": 64, "rows": 256, "validation_every": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without a tokenizer, and the same token ids in two forms."""
    folder, random = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    tiny_model().save_pretrained(folder / "model")
    ids = [random.integers(3, 260, random.integers(1, 40)).tolist() for _ in range(120)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"ids": own}) + "\n" for own in ids))
    np.concatenate([[*own, END] for own in ids]).astype("<u2").tofile(folder / "a.bin")
    (folder / "text.jsonl").write_text('{"text": "a"}\n' * 9)
    return folder


def make_config(folder, dataset, **changes):
    usual = {"hookpoints": ("layers.0",), "model_dtype": "float32", "device": "cpu", **SIZES}
    usual |= {"model": str(folder / "model"), "dataset": str(folder / dataset)}
    return CollectConfig(**(usual | changes))


def test_from_collection_to_repair(folder, tmp_path):
    config = make_config(folder, "a.jsonl", text_column="ids")
    target = find_store(tmp_path / "root", config)
    assert target.summary is None
    collect(target.config, target.storage)
    store = open_store(target.storage)
    assert "tokenizer_digest" not in store.identity
    assert read_store_file(target.storage)["provenance"]["tokenizer"] == {"special_ids": [1, END]}
    assert find_store(tmp_path / "root", config).summary
    tokens = {part: store.tokens.read_tokens(part) for part in store.part_numbers(TOKENS)}
    path = tmp_path / "root" / target.storage.name
    shutil.rmtree(path / "arrays.zarr" / "tokens" / "c" / "2")
    shutil.rmtree(path / "arrays.zarr" / "acts" / "layers.0" / "output" / "c" / "3")
    done = repair(path, RepairConfig(device="cpu"))
    assert done.intact
    assert {mark.outcome for mark in done.marks} == {"mended"}
    again = open_store(path)
    assert all((again.tokens.read_tokens(part) == own).all() for part, own in tokens.items())


def test_a_bin_gives_the_same_tokens(folder, tmp_path):
    for name, changes in (("a.jsonl", {"text_column": "ids"}), ("a.bin", {})):
        collect(make_config(folder, name, **changes), tmp_path / name)
    stores = [open_store(open_storage(tmp_path / name)) for name in ("a.jsonl", "a.bin")]
    parts = stores[0].part_numbers(TOKENS)
    assert parts == stores[1].part_numbers(TOKENS)
    assert all(
        (stores[0].tokens.read_tokens(p) == stores[1].tokens.read_tokens(p)).all() for p in parts
    )


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        ("text.jsonl", {}, "holds text, but the model .* has no tokenizer"),
        ("a.jsonl", {"text_column": "body"}, "got body; use one of ids"),
        ("a.jsonl", {"text_column": "ids", "model": "model"}, "the model .* does not exist"),
    ],
)
def test_mistakes_are_refused_before_the_weights_are_loaded(
    folder, tmp_path, monkeypatch, dataset, changes, message
):
    monkeypatch.setattr(collect_module, "load_for_collection", None)
    if "model" in changes:
        changes = {"model": str(folder / "nothing")}
    with pytest.raises(ValueError, match=message):
        collect(make_config(folder, dataset, **changes), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_tokenizer_stays_a_part_of_the_identity(folder, tmp_path):
    save_tiny(tmp_path / "model")
    config = make_config(folder, "a.jsonl", text_column="ids", model=str(tmp_path / "model"))
    collect(config, tmp_path / "s")
    assert "tokenizer_digest" in open_store(tmp_path / "s").identity
