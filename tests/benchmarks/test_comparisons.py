"""Comparisons with other tools: our part is measured, and an absent tool is named."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import compare_coders, compare_loaders
from benchmarks.other_coder_adapters import ADAPTERS
from benchmarks.saelens_reader import saelens_reads
from mptrain.bench.config import LoaderBenchConfig
from mptrain.bench.loader import first_rows
from mptrain.data.loader import open_store
from tests.helpers.stores import small_store

PURSUIT = ["--rows", "40", "--width", "8", "--latents", "16", "--k", "3", "--repeats", "1"]


def test_coders_of_installed_tools_are_measured_beside_ours() -> None:
    options = [*PURSUIT, "--tool-rows", "9", "--tools", "sae-lens", "--device", "cpu", "--json"]
    result = CliRunner().invoke(compare_coders.app, options)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("loading torch\n")
    report = json.loads(result.stdout)
    names = [row["method"] for row in report["methods"]]
    assert names[0] == "direct"
    assert names[-1] == "bare products"
    assert {row["rows"] for row in report["methods"]} == {9}
    is_installed = find_spec("sae_lens") is not None
    assert any("SAELens" in name for name in names) == is_installed
    assert ("sae-lens" in report["absent"]) == (not is_installed)


def test_an_unknown_tool_is_refused() -> None:
    result = CliRunner().invoke(compare_coders.app, [*PURSUIT, "--tools", "saelens"])
    assert result.exit_code == 2
    assert f"must be one of {', '.join(ADAPTERS)}, got 'saelens'" in result.stderr


def test_the_loader_is_measured_beside_saelens(tmp_path: Path) -> None:
    store = str(small_store(tmp_path)[0])
    options = ["--rows", "600", "--batch-rows", "64", "--window-rows", "128", "--repeats", "1"]
    result = CliRunner().invoke(
        compare_loaders.app, [store, *options, "--saelens-rows", "320", "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["method"] for row in report["readings"]][:2] == ["loader", "bare decode"]
    assert (report["absent"] is None) == (find_spec("sae_lens") is not None)
    several = ["--hookpoints", "layers.0,layers.1.mlp"]
    refused = CliRunner().invoke(compare_loaders.app, [store, *options, *several])
    assert refused.exit_code == 2
    assert "hookpoints must be a single one here, got 2" in " ".join(refused.stderr.split())


def test_saelens_gets_the_first_rows_of_the_store(tmp_path: Path) -> None:
    store = open_store(str(small_store(tmp_path)[0]))
    config = LoaderBenchConfig(store="", batch_rows=64, window_rows=128, device="cpu")
    rows = first_rows(config, store, ("layers.0", "output"), 100)
    assert rows.shape == (100, 16)
    assert torch.equal(rows, first_rows(config, store, ("layers.0", "output"), 1000)[:100])


@pytest.mark.skipif(find_spec("sae_lens") is None, reason="needs sae_lens")
def test_saelens_reads_its_cache_of_the_same_rows(tmp_path: Path) -> None:
    reads = saelens_reads(torch.randn(64 * 40, 6).bfloat16(), 64, tmp_path / "arrow")
    in_order, mixed = reads.values()
    assert in_order() == 32 * 64  # whole batches of 32 sequences
    assert mixed() >= 40 * 64
