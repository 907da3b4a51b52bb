"""The digested files are the loaded files, whatever has their paths before or after."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpcache.collection import producer as producer_module
from mpcache.collection.collect import collect
from mpcache.collection.find_store import find_store
from mpcache.model.file_snapshot import ModelFileSnapshot, file_stamp, files_digest, is_intact
from mpcache.model.loading import load_model, load_tokenizer
from mpcache.model.model_identity import model_digest, tokenizer_digest
from mpcache.model.model_source import ModelSource, find_source
from mpcache.store.reader import open_store
from tests.helpers.models import save_tiny, tiny_model, tiny_tokenizer
from tests.helpers.stores import files_of, small_config

TIME = 1_700_000_000


def replace_with(target: Path, source: Path, in_place: bool = False) -> None:
    """Other content, perhaps of another size, with the same name and modification time."""
    if in_place:
        target.write_bytes(source.read_bytes())
    else:
        target.unlink()
        shutil.copy(source, target)
    os.utime(target, (TIME, TIME))


def aged(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (TIME, TIME))


@pytest.fixture
def two(tmp_path):
    """Two models of the same sizes, in folders of the same name, all files of one time."""
    folders = [tmp_path / name / "model" for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        save_tiny(folder, seed=seed)
        aged(folder)
    return folders


@pytest.mark.parametrize("in_place", [True, False])
def test_replaced_weights_are_other_weights(tmp_path, two, in_place):
    config = small_config(tmp_path, model=str(two[0]), rows=400)
    wanted = small_config(tmp_path, model=str(two[1]), rows=400)
    collect(config, tmp_path / "first")
    replace_with(two[0] / "model.safetensors", two[1] / "model.safetensors", in_place)
    collect(config, tmp_path / "second")
    collect(wanted, tmp_path / "third")
    first, second, third = (open_store(tmp_path / n) for n in ("first", "second", "third"))
    assert first.fingerprint != second.fingerprint == third.fingerprint
    assert arrays_of(tmp_path / "second") == arrays_of(tmp_path / "third")


def arrays_of(store: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(store).items() if name != "store.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_root_distinguishes_replaced_files(tmp_path, two, name):
    """Between two collections, a file gets other content at the same path and time."""
    config = small_config(tmp_path, model=str(two[0]), rows=400)
    storage = find_store(tmp_path / "root", config).storage
    collect(config, storage)
    assert find_store(tmp_path / "root", config).summary is not None
    content = json.loads((two[1] / "config.json").read_text())
    (two[1] / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 0.25}))
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(two[1])
    if name == "tokenizer.json":  # one more id needs one more embedding
        enlarge(two[0], two[1])
    replace_with(two[0] / name, two[1] / name)
    target = find_store(tmp_path / "root", config)
    assert target.summary is None
    assert target.storage.address != storage.address


def enlarge(*folders: Path) -> None:
    for folder in folders:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "vocab_size": 262}))
        weights = load_file(folder / "model.safetensors")
        weights["embed_tokens.weight"] = torch.ones(262, 16)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_file_replaced_while_the_model_is_loaded_is_refused(tmp_path, two, monkeypatch):
    config = small_config(tmp_path, model=str(two[0]))

    def load(*arguments, **options):
        model = load_model(*arguments, **options)
        replace_with(two[0] / "model.safetensors", two[1] / "model.safetensors")
        return model

    monkeypatch.setattr(producer_module, "load_model", load)
    with pytest.raises(ValueError, match=r"model\.safetensors of .* changed while the model"):
        collect(config, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_file_replaced_after_the_load_is_not_digested_as_the_model(tmp_path, two):
    loaded = producer_module.load_for_collection(small_config(tmp_path, model=str(two[0])))
    assert loaded.files_digest() == files_digest(small_config(tmp_path, model=str(two[0])))
    replace_with(two[0] / "config.json", two[1] / "config.json", in_place=True)
    with pytest.raises(ValueError, match=r"config\.json"):
        loaded.files_digest()


def test_a_log_in_the_models_folder_is_no_change(tmp_path, two):
    files = ModelFileSnapshot.take(find_source(small_config(tmp_path, model=str(two[0]))))
    (two[0] / "collect.log").write_text("new")
    assert files.is_unchanged()
    (two[0] / "pytorch_model.bin").write_text("new")
    assert not files.is_unchanged()


def test_a_loaded_model_does_not_follow_its_file(tmp_path, two):
    """Weights in the dtype of their file could be mapped from the file and change with it."""
    model, _ = load_model(small_config(tmp_path, model=str(two[0])))
    digest = model_digest(model)
    file = two[0] / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(1000))
    assert model_digest(model) == digest


def test_a_stale_tokenizer_config_counts(tmp_path, two):
    config = small_config(tmp_path, model=str(two[0]))
    before = tokenizer_digest(load_tokenizer(config))
    path = two[0] / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "split_special_tokens": True}))
    os.utime(path, (TIME, TIME))
    assert tokenizer_digest(load_tokenizer(config)) != before
    path.write_text(json.dumps({**content, "eos_token": "<s>"}))
    assert tokenizer_digest(load_tokenizer(config)) != before


# --- code that comes with a model ---

CODE = """
from transformers import LlamaConfig, LlamaModel
from .helper import FACTOR
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaModel):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * FACTOR
        return out
"""


def own_model(folder: Path, factor: str) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(
        json.dumps({**content, "model_type": "own", "auto_map": auto})
    )
    (folder / "own.py").write_text(CODE)
    (folder / "helper.py").write_text(f"FACTOR = {factor}\n")
    aged(folder)
    return folder


def test_code_is_part_of_the_digest_whatever_is_cached(tmp_path):
    config = small_config(tmp_path, trust_remote_code=True)
    digests, outputs = [], []
    for number, factor in enumerate(("2.0", "3.0", "2.0")):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        folder = own_model(tmp_path / "own", factor)
        model, _ = load_model(dataclasses.replace(config, model=str(folder)))
        digests.append(model_digest(model))
        outputs.append(model(torch.tensor([[5, 6, number]]))[0][0, 0])
    assert digests[0] == digests[2] != digests[1]
    torch.testing.assert_close(outputs[0] * 1.5, outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert files_digest(dataclasses.replace(config, model=str(folder))) is None


@pytest.mark.slow
def test_code_in_the_common_cache_is_not_run(tmp_path):
    """An earlier process left a different copy of the code in the cache."""
    folder = own_model(tmp_path / "own", "2.0")
    script = f"""
import sys, pathlib
from mpcache.config import CollectConfig
from mpcache.model.loading import load_model
from mpcache.model.model_identity import model_digest
if sys.argv[1] == "plain":
    from transformers import AutoModel
    AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
else:
    config = CollectConfig(model={str(folder)!r}, dataset="x", hookpoints=("layers.0",),
                           ctx_len=16, trust_remote_code=True, device="cpu")
    model = load_model(config)[0]
    print("factor", sys.modules[type(model).__module__].FACTOR, model_digest(model))
"""
    cache = tmp_path / "modules"

    def run(how: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", script, how], capture_output=True, text=True, check=True,
            env=os.environ | {"HF_MODULES_CACHE": str(cache)},
        ).stdout  # fmt: skip

    fresh = run("ours")
    run("plain")
    (copy,) = cache.rglob("helper.py")
    copy.write_text("FACTOR = 9.0\n")  # same length and time as the original, so it counts as equal
    os.utime(copy, (TIME, TIME))
    assert run("ours") == fresh
    assert fresh.startswith("factor 2.0")


# --- the Hub's cache ---


def cached_on_hub(cache: Path, original: Path) -> Path:
    """A repository o/r in the Hub's cache at one commit, as downloads leave it."""
    repository, commit = cache / "models--o--r", "c" * 40
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in original.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            name = hashlib.sha256(content).hexdigest()
        else:
            name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (blobs / name).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_the_hubs_cache_is_checked_against_its_names(tmp_path, two):
    snapshot = cached_on_hub(tmp_path / "hub", two[0])
    assert all(is_intact(path) for path in snapshot.iterdir())
    paths = {path.name: path for path in snapshot.iterdir()}
    assert files_at(paths).digest() == f"commit {'c' * 40}"
    for name in ("model.safetensors", "tokenizer.json"):
        content = paths[name].read_bytes()
        paths[name].resolve().write_bytes(content[:-1] + b"\n")
        assert is_intact(paths[name]) is False
        with pytest.raises(ValueError, match="its checksum differs from that on the Hub"):
            files_at(paths).digest()
        paths[name].resolve().write_bytes(content)
    shutil.copy(paths["config.json"], tmp_path / "config.json")  # no link, so no digest is known
    assert files_at({**paths, "config.json": tmp_path / "config.json"}).digest() is None


def files_at(paths: dict[str, Path]) -> ModelFileSnapshot:
    seen = {name: file_stamp(path) for name, path in paths.items()}
    return ModelFileSnapshot(ModelSource("o/r", revision="c" * 40), seen, paths)


HUB = """
import sys
from mpcache.collection.collect import collect
from mpcache.config import CollectConfig
from mpcache.store.reader import open_store
config = CollectConfig(model="o/r", dataset=sys.argv[1], hookpoints=("layers.0",), rows=64,
                       ctx_len=16, part_rows=64, chunk_rows=32, device="cpu")
try:
    collect(config, sys.argv[2])
    model = open_store(sys.argv[2]).provenance["model"]
    print(model["model"], model["model_revision"], model["model_files"])
except ValueError as error:
    print("ValueError", error)
"""


@pytest.mark.slow
def test_a_model_of_the_hub_is_what_its_commit_says(tmp_path, two):
    """Offline, in separate processes, since the Hub's client reads its settings once."""
    snapshot = cached_on_hub(tmp_path / "hub", two[0])
    small_config(tmp_path)  # makes the corpus

    def run(store: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", HUB, str(tmp_path / "corpus.jsonl"), str(tmp_path / store)],
            env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    commit = "c" * 40
    assert run("first") == f"o/r {commit} commit {commit}\n"
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes((two[1] / "model.safetensors").read_bytes())
    assert "its checksum differs from that on the Hub" in run("second")
    assert not (tmp_path / "second").exists()
    assert "model_digest" in run("first"), "the store that is there was made from other weights"
    blob.write_bytes(blob.read_bytes()[:-9])
    assert "is cut short" in run("third")
    assert not (tmp_path / "third").exists()
