"""The experiment files of the repository: original settings, and small twins."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from mpcli.sweep_collection import collect_sides, read_experiment
from mptrain.experiments.runs import plan_runs
from mptrain.experiments.spec import Experiment
from mptrain.experiments.sweep import run_config
from mptrain.runs.fit import fit
from mptrain.runs.metrics_file import read_records
from tests.helpers.models import VOCABULARY, tiny_tokenizer
from tests.helpers.paths import PROJECT
from tests.helpers.stores import write_corpus

FOLDER = PROJECT / "data" / "experiments"
FULL = ("smollm2", "llama")
# layers and heads of the originals, all else small: hidden, MLP, layers, heads, key-value heads
SHAPES = {"smollm2": (36, 96, 30, 9, 3), "llama": (64, 160, 16, 32, 8)}
REQUIRED = {  # SCIENCE: what an ablation panel compares
    "mp", "topk", "batch-mp", "nested", "batch-mp-nested", "gradient-pursuit", "orthogonal",
    "sliced", "detach", "per-step-loss", "predicting", "free-norm", "from-topk",
}  # fmt: skip
SMALL = (
    "collect.rows=256", "collect.ctx_len=16", "collect.part_rows=64", "collect.chunk_rows=16",
    "collect.batch_sequences=16", "collect.validation_every=4", "collect.model_dtype=float32",
    "collect.device=cpu", "data.rows=16", "data.batch_rows=8", "evaluation.eval_every=2",
    "evaluation.eval_rows=32", "run.log_every=1", "run.device=cpu", "coder.expansion=16",
    "loss.dead_rows=8",
)  # fmt: skip


def save_small(name: str, folder: Path) -> Path:
    """A random model with the original's architecture and module names."""
    hidden, mlp, layers, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def experiment(name: str) -> Experiment:
    return read_experiment(FOLDER / f"{name}.toml", ())[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_full_size_file_starts_on_a_small_model_of_its_architecture(name, tmp_path):
    """Every hookpoint exists, and every coder takes two train steps."""
    paths = {
        "collect.model": save_small(name, tmp_path / "model"),
        "collect.dataset": write_corpus(tmp_path / "corpus.jsonl", documents=90),
        "root": tmp_path / "stores",
        "folder": tmp_path / "run",
    }
    seeds = [f"figures.{figure.name}.seeds=[0]" for figure in experiment(name).figures]
    changes = [*(f"{key}={path}" for key, path in paths.items()), *SMALL, *seeds]
    small, config = read_experiment(FOLDER / f"{name}.toml", changes)
    store = collect_sides(small, config, small.sides)
    (run,) = plan_runs(tmp_path / "run", small.coders, ())
    results = fit(run_config(small, run, store))
    assert {result.coder for result in results} == {coder.name for coder in small.coders}
    assert not any(result.diverged for result in results)
    assert max(record.step for record in read_records(run.folder / "metrics.jsonl")) == 2


def test_the_panels_of_the_original():
    smollm2, llama = experiment("smollm2"), experiment("llama")
    figures = {figure.name: figure.panels for figure in smollm2.figures}
    assert [(p.hookpoint, p.k) for p in figures["fvu"]] == [
        (f"layers.{layer}{end}", k)
        for k in (64, 128)
        for end in ("", ".mlp")
        for layer in (10, 15, 20)
    ]
    layers = [f"layers.{layer}" for layer in (10, 15, 20)]
    assert [p.hookpoint for p in figures["mp-ablations"]] == layers
    assert [p.hookpoint for p in figures["sst-ablations"]] == [f"{layer}.mlp" for layer in layers]
    assert {p.kind for p in figures["sst-ablations"]} == {"skip-transcoder"}
    assert [p.hookpoint for p in llama.panels] == ["layers.12.mlp"]


@pytest.mark.parametrize("name", FULL)
def test_an_ablation_has_all_variants(name):
    for panel in experiment(name).panels:
        if panel.figure != "fvu":
            names = {line.variant.name for line in panel.lines}
            assert names >= REQUIRED
            if panel.kind != "sae":
                assert names >= {"separate", "sliced-selecting", "sliced-predicting", "input-loss"}


@pytest.mark.parametrize("name", FULL)
def test_a_twin_has_the_same_shape(name):
    full, twin = experiment(name), experiment(f"{name}-demo")
    assert [figure.name for figure in twin.figures] == [figure.name for figure in full.figures]
    for figure, other in zip(full.figures, twin.figures, strict=True):
        assert len(figure.panels) == len(other.panels)
        assert (figure.settings.variants, figure.settings.kind) == (
            other.settings.variants,
            other.settings.kind,
        )
        assert figure.settings.seeds == other.settings.seeds
        assert figure.settings.title != other.settings.title
    shared = {"optimizer", "lr", "auxk_alpha", "warmup_share"}
    assert {n: full.coder_settings.get(n) for n in shared} == {
        n: twin.coder_settings.get(n) for n in shared
    }
    assert full.header.folder != twin.header.folder


@pytest.mark.parametrize("name", [*FULL, *(f"{name}-demo" for name in FULL)])
def test_lines_share_all_but_what_sets_them_apart(name):
    for panel in experiment(name).panels:
        assert {"mp", "topk"} <= {line.variant.name for line in panel.lines}
        for line in panel.lines:
            for coder, plain in zip(line.coders, panel.lines[0].coders, strict=True):
                same = dataclasses.replace(plain, **dict(line.variant.changes))
                assert coder == same


def test_three_seeds_for_red_and_blue():
    for name in ("smollm2", "smollm2-demo"):
        assert experiment(name).figures[0].settings.seeds == (0, 1, 2)
