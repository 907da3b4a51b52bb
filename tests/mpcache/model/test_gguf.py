"""A .gguf file as MODEL: the rows are those of transformers, and a damaged file is one line."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModel, GgufConfig

from mpcache.collection.collect import collect
from mpcache.collection.find_store import find_store
from mpcache.config import RepairConfig
from mpcache.data.permutation import row_permutation
from mpcache.maintenance.repair import repair
from mpcache.model.file_snapshot import ModelFileSnapshot, file_digest
from mpcache.model.gguf import check_gguf
from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hooks import Capture
from mpcache.model.loading import load_model, load_tokenizer
from mpcache.model.model_identity import model_digest
from mpcache.model.model_source import find_source
from mpcache.model.splice import SplicedModel
from mpcache.store.reader import open_store
from tests.helpers.gguf_files import TEMPLATE, write_gguf
from tests.helpers.models import captured
from tests.helpers.stores import small_config

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


def config_of(folder, file, **changes):
    return small_config(folder, model=str(file), **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_those_of_transformers(tmp_path, file, dtype):
    config = config_of(tmp_path, file, model_dtype=dtype, dtype="float32", batch_sequences=12)
    collect(config, tmp_path / "store")
    store = open_store(tmp_path / "store")
    plain = AutoModel.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    side = Side("layers.1.mlp", "output")
    with Capture(plain, resolve_sides(["layers.1.mlp:output"], plain)) as capture:
        tokens = torch.from_numpy(store.tokens.read_tokens(0).astype(np.int64))
        wanted = captured(capture, {"input_ids": tokens})[side].float().flatten(0, 1)
    order = row_permutation(config.seed, 0, len(wanted))
    rows = torch.cat([
        store.acts.read_chunk("layers.1.mlp", "output", 0, chunk)
        for chunk in range(len(wanted) // config.chunk_rows)
    ])  # fmt: skip
    assert torch.equal(rows.float(), wanted[order])


def test_the_model_is_dense_and_named_by_its_weights(tmp_path, file):
    config = config_of(tmp_path, file)
    model, tokenizer = load_model(config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not [m for m in model.modules() if "gguf" in type(m).__name__.lower()]
    assert getattr(model.config, "quantization_config", None) is None
    assert "gguf" not in str(model.config.to_diff_dict()).lower()
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    assert tokenizer("ab", add_special_tokens=False)["input_ids"]
    renamed = file.rename(tmp_path / "other.gguf")
    again = load_model(dataclasses.replace(config, model=str(renamed)))[0]
    assert model_digest(again) == model_digest(model)
    model.to(torch.float64)  # a quantised model would refuse


def test_the_file_names_the_model_below_a_root(tmp_path, file, monkeypatch):
    config = config_of(tmp_path, file)
    storage = find_store(tmp_path / "root", config).storage
    collect(config, storage)
    provenance = open_store(storage).provenance["model"]
    assert provenance["model_files"] == f"sha256 {file_digest(file)}"
    assert provenance["model"] == "tiny.gguf"
    monkeypatch.setattr("mpcache.collection.find_store.load_model", None)
    moved = file.rename(tmp_path / "moved.gguf")
    again = find_store(tmp_path / "root", dataclasses.replace(config, model=str(moved)))
    assert again.storage.address == storage.address
    assert again.summary is not None


def test_repair_and_splice_take_the_file(tmp_path, file):
    config = config_of(tmp_path, file)
    collect(config, tmp_path / "store")
    spliced = SplicedModel(tmp_path / "store", str(file), None, "cpu")
    assert spliced.logits(next(spliced.examples()).inputs).isfinite().all()
    shard = next((tmp_path / "store" / "arrays.zarr" / "acts").rglob("c/0/0"))
    content = shard.read_bytes()
    shard.write_bytes(b"\1" * len(content))
    assert repair(tmp_path / "store", RepairConfig(model=str(file), device="cpu")).intact
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "cut short: it has"),
        (lambda file: file.write_bytes(file.read_bytes()[:700]), "cut short: its header"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes(b"GGUF"), "cut short"),
        (lambda file: file.write_text("<!DOCTYPE html><html>"), "is a web page"),
        (lambda file: file.write_bytes(b"ZIP0" * 100), "must be a GGUF file"),
        (lambda file: file.write_bytes(b"GGUF\x01" + bytes(100)), "version 2 or 3"),
        (lambda file: write_gguf(file, fields={"split.count": 2}), "one of 2 pieces"),
        (lambda file: write_gguf(file, architecture="nosuch"), "nosuch"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_a_line(tmp_path, file, damage, message):
    damage(file)
    for load in (load_tokenizer, load_model):
        with pytest.raises(ValueError, match=message) as error:
            load(config_of(tmp_path, file))
        assert "\n" not in str(error.value)
        assert "tiny.gguf" in str(error.value)


def test_missing_packages_are_named(file, monkeypatch):
    monkeypatch.setattr("mpcache.model.gguf.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mpcache\[gguf\]'"):
        check_gguf(file)


def test_paths_that_are_no_gguf_file_are_refused(tmp_path, file):
    (tmp_path / "folder").mkdir()
    inside = file.rename(tmp_path / "folder" / "in.gguf")
    with pytest.raises(ValueError, match=r"give the file itself: .*in\.gguf"):
        find_source(config_of(tmp_path, inside.parent))
    other = inside.rename(tmp_path / "in.bin")
    with pytest.raises(ValueError, match=r"with the ending \.gguf"):
        find_source(config_of(tmp_path, other))
    with pytest.raises(ValueError, match=r"nowhere.* does not exist; give an existing folder"):
        find_source(config_of(tmp_path, "nowhere.gguf"))


def test_a_file_that_changes_is_noticed(tmp_path, file):
    files = ModelFileSnapshot.take(find_source(config_of(tmp_path, file)))
    assert files.is_unchanged()
    write_gguf(file, seed=1)
    with pytest.raises(ValueError, match=r"tiny\.gguf of .* changed while the model was loaded"):
        files.digest()
