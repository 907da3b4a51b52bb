"""Autocast and compiled layers change only what they should, and the store records them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

from mpcache.collection import commit_threads
from mpcache.collection.collect import collect
from mpcache.config import CollectConfig
from mpcache.maintenance.verify import verify
from mpcache.model import compile as compile_module
from mpcache.model.compile import CompiledLayers, children_of_layers
from mpcache.model.hookpoint_patterns import resolve_sides
from mpcache.model.hooks import Capture
from mpcache.model.loading import load_model
from mpcache.model.model_identity import model_digest
from mpcache.model.splice import SplicedModel
from mpcache.storage.base import open_storage
from mpcache.store.fingerprint import identify
from mpcache.store.reader import open_store
from mpcache.store.store_metadata import read_store_file
from tests.helpers.models import captured, tiny_model
from tests.helpers.stores import small_config

TOKENS = {"input_ids": torch.randint(0, 250, (3, 7), generator=torch.Generator().manual_seed(0))}


def rows(path: Path, array: str = "acts/layers.1.mlp/output") -> torch.Tensor:
    store = open_store(path)
    parts = [store.read_part(array, part)[array] for part in store.part_numbers(array)]
    return torch.from_numpy(np.concatenate(parts)).float()


# --- autocast ---


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_autocast_keeps_weights_and_computes_lower(tmp_path: Path, name: str) -> None:
    config = small_config(tmp_path, autocast=True, model_dtype=name)
    model, _ = load_model(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with Capture(model, resolve_sides(["layers.1.mlp:output", "layers.1"], model)) as capture:
        layer, mlp = captured(capture, TOKENS).values()
    assert (mlp.dtype, layer.dtype) == (getattr(torch, name), torch.float32)
    exact, _ = load_model(small_config(tmp_path))
    with Capture(exact, capture.sides) as capture:
        expected = captured(capture, TOKENS)[capture.sides[0]]
    error = (layer - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    assert model_digest(model) == model_digest(exact), "the same weights, computed with otherwise"


@pytest.mark.parametrize("cross", [True, False])
def test_rows_by_autocast_differ_and_the_store_records_it(tmp_path: Path, cross: bool) -> None:
    lower: dict[str, object] = {"model_dtype": "bfloat16", "cross_document_attention": cross}
    lower |= {"dtype": "float32", "rows": 192}
    collect(small_config(tmp_path, **lower), tmp_path / "plain")
    collect(small_config(tmp_path, autocast=True, **lower), tmp_path / "autocast")
    assert not torch.equal(rows(tmp_path / "plain"), rows(tmp_path / "autocast"))
    with pytest.raises(ValueError, match="autocast: False in the store, True requested"):
        collect(small_config(tmp_path, autocast=True, **lower), tmp_path / "plain")
    with pytest.raises(ValueError, match="autocast: True in the store, False requested"):
        collect(small_config(tmp_path, **lower), tmp_path / "autocast")
    assert verify(tmp_path / "autocast").intact


def test_a_repair_computes_by_autocast_too(tmp_path: Path) -> None:
    config = small_config(tmp_path, autocast=True, model_dtype="bfloat16", rows=192)
    AutoModelForCausalLM.from_config(tiny_model().config).save_pretrained(config.model)
    collect(config, tmp_path / "store")
    spliced = SplicedModel(tmp_path / "store", config.model, None, "cpu")
    seen = []
    layer = spliced.model.base_model.get_submodule("layers.1.mlp")
    layer.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    spliced.logits(next(spliced.examples()).inputs)
    assert seen == [torch.bfloat16]


def test_autocast_needs_a_dtype_to_cast_to(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--autocast needs .*got float32; use --model-dtype bfloat16"
    ):
        small_config(tmp_path, autocast=True, model_dtype="float32")


def test_settings_that_are_off_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    plain = identify(small_config(tmp_path), {}, "sdpa")
    assert not {"autocast", "compile"} & set(plain)
    changed = small_config(tmp_path, compile=True, autocast=True, model_dtype="bfloat16")
    assert identify(changed, {}, "sdpa") == {
        **plain, "model_dtype": "bfloat16", "autocast": True, "compile": True
    }  # fmt: skip


# --- compiled layers ---

CHILDREN = {
    "llama": ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"],
    "gpt2": ["ln_1", "attn", "ln_2", "mlp"],
    "bert": ["attention", "intermediate", "output"],
}


@pytest.mark.parametrize("name", CHILDREN)
def test_compiles_the_children_of_every_layer(name: str) -> None:
    layers = {"llama": "layers", "gpt2": "h", "bert": "encoder.layer"}[name]
    expected = {f"{layers}.{n}.{child}" for n in range(3) for child in CHILDREN[name]}
    assert set(children_of_layers(tiny_model(name))) == expected


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts compiled graphs and runs them unchanged."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(compile_module, "BACKEND", counter)
    return counter


@pytest.mark.parametrize("name", CHILDREN)
def test_compiled_layers_compute_the_same_under_hooks(name: str, counter: CompileCounter) -> None:
    model = tiny_model(name)
    children = children_of_layers(model)
    sides = resolve_sides([*children, *{child.rpartition(".")[0] for child in children}], model)
    with Capture(model, sides) as capture:
        expected = captured(capture, TOKENS)
        assert counter.frame_count == 0
        with CompiledLayers(model, sides).used():
            compiled = captured(capture, TOKENS)
        assert counter.frame_count > 0
        for side in sides:
            torch.testing.assert_close(compiled[side], expected[side])
        count = counter.frame_count
        captured(capture, TOKENS)
    assert counter.frame_count == count, "outside nothing is compiled"
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_and_shapes_share_what_was_compiled(counter: CompileCounter) -> None:
    model = tiny_model()
    sides = resolve_sides(["layers.2"], model)
    with Capture(model, sides) as capture, CompiledLayers(model, sides).used():
        for sequences in (1, 2, 3):
            captured(capture, {"input_ids": TOKENS["input_ids"][:sequences]})
        assert counter.frame_count == 3 * 3, "attention, MLP and norm, three shapes"
        captured(capture, {"input_ids": TOKENS["input_ids"][:2]})
        assert counter.frame_count == 3 * 3


def test_values_do_not_depend_on_what_else_is_captured(counter: CompileCounter) -> None:
    model = tiny_model()
    results = []
    for patterns in (["layers.1"], ["layers.1", "layers.0.mlp", "layers.*.self_attn"]):
        sides = resolve_sides(patterns, model)
        with Capture(model, sides) as capture, CompiledLayers(model, sides).used():
            results.append(captured(capture, TOKENS)[resolve_sides(["layers.1"], model)[0]])
    assert torch.equal(*results)


def test_refuses_hookpoints_inside_of_what_is_compiled(counter: CompileCounter) -> None:
    model = tiny_model()
    with pytest.raises(
        ValueError, match=r"compiles layers.1.mlp as one module, .* remove --compile"
    ):
        CompiledLayers(model, resolve_sides(["layers.1.mlp.up_proj"], model))
    with pytest.raises(ValueError, match="needs a model whose layers are in a list"):
        CompiledLayers(torch.nn.Sequential(torch.nn.Linear(2, 2)), ())


def test_a_compiled_collection_is_recorded_in_the_store(
    tmp_path: Path, counter: CompileCounter
) -> None:
    options: dict[str, object] = {"dtype": "float32", "rows": 500}
    collect(small_config(tmp_path, compile=True, **options), tmp_path / "compiled")
    assert counter.frame_count > 0
    count = counter.frame_count
    collect(small_config(tmp_path, **options), tmp_path / "plain")
    assert counter.frame_count == count
    torch.testing.assert_close(rows(tmp_path / "compiled"), rows(tmp_path / "plain"))
    identity = read_store_file(open_storage(tmp_path / "compiled"))["identity"]
    assert identity["compile"] is True
    with pytest.raises(ValueError, match="compile: True in the store, False requested"):
        collect(small_config(tmp_path, **options), tmp_path / "compiled")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor imports such code
def test_inductor_computes_what_the_model_computes() -> None:
    torch._dynamo.reset()
    model = tiny_model(layers=1)  # the C++ compiler takes seconds for each module of a layer
    sides = resolve_sides(["layers.*", "layers.*.mlp"], model)
    with Capture(model, sides) as capture:
        expected = captured(capture, TOKENS)
        with CompiledLayers(model, sides).used():
            compiled = captured(capture, TOKENS)
    for side in sides:
        torch.testing.assert_close(compiled[side], expected[side], rtol=1e-4, atol=1e-4)


def test_write_threads_change_nothing_but_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    kind = commit_threads.PartCommitter

    def committer(threads: int) -> commit_threads.PartCommitter:
        asked.append(threads)
        return kind(threads)

    monkeypatch.setattr("mpcache.collection.collect.PartCommitter", committer)
    for threads in (1, 3):
        config = small_config(tmp_path, rows=500, write_threads=threads)
        collect(config, tmp_path / str(threads))
    assert asked == [1, 3]
    assert torch.equal(rows(tmp_path / "1"), rows(tmp_path / "3"))
    with pytest.raises(ValueError, match="write_threads must be at least 1"):
        CollectConfig(model="m", dataset="d", hookpoints=("h",), write_threads=0)
