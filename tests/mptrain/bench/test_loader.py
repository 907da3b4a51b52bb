"""The loader's benchmark: what it counts is what it says; how fast this machine is, it does not."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mpcache.store.reader import open_store
from mpcli.mptrain import app
from mptrain.bench import loader as bench_module
from mptrain.bench.loader import bench_loader, mixing, read_bare, read_with_loader
from mptrain.bench.peers import saelens_reads
from mptrain.config.run import LoaderBenchConfig
from tests.helpers.stores import small_store

SIDE = ("layers.0", "output")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LoaderBenchConfig:
    store = small_store(tmp_path_factory.mktemp("bench"))[0]
    return LoaderBenchConfig(
        store=str(store), rows=700, batch_rows=64, window_rows=128, read_threads=2,
        peer_rows=320, repeats=1, device="cpu",
    )  # fmt: skip


def test_both_read_the_same_chunks(
    config: LoaderBenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(config.store)
    read, seen = store.read_chunk, []

    def watched(*place: object) -> torch.Tensor:
        seen.append(place[:4])
        return read(*place)

    monkeypatch.setattr(store, "read_chunk", watched)
    rows = read_bare(config, store, SIDE)
    bare, seen[:] = list(seen), []
    assert 700 <= rows < 700 + 32
    assert 700 - 64 < read_with_loader(config, store, SIDE) <= 700
    assert set(bare) <= set(seen)


def test_mixing_counts_sequences(
    config: LoaderBenchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "MIXED_ROWS", 48)
    store = open_store(config.store)
    found = {
        rows: mixing(dataclasses.replace(config, window_rows=rows), store, SIDE)
        for rows in (32, 128, 2000)
    }
    assert found[32].sequences == sum(p.rows for p in store.parts([SIDE], "train")) // 16
    # a part has 12 sequences; a window of a chunk is of one part, and a batch of two windows
    assert found[32].distinct <= 24 < found[128].distinct < found[2000].distinct
    assert found[2000].share == pytest.approx(1, abs=0.05)


def test_report_and_command(config: LoaderBenchConfig) -> None:
    report = bench_loader(dataclasses.replace(config, steps=2, k=2, expansion=2))
    readings = {one.method: one for one in report.readings}
    assert readings["loader"].loader_ratio == 1
    assert readings["bare decode"].rows_per_second > 0
    assert [one.arch for one in report.waiting] == ["mp", "topk"]
    assert all(one.waited_seconds < one.store_seconds for one in report.waiting)
    assert (report.absent is None) == (find_spec("sae_lens") is not None)
    call = ["bench-loader", config.store, "--rows", "600", "--batch-rows", "64", "--repeats", "1"]
    shown = CliRunner().invoke(app, call)
    assert "bare decode" in shown.stdout
    assert "distinct" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert told["bench"]["batch_rows"] == 64
    assert told["waiting"] == []


@pytest.mark.skipif(find_spec("sae_lens") is None, reason="needs sae_lens")
def test_saelens_reads_its_cache_of_the_same_rows(tmp_path: Path) -> None:
    reads = saelens_reads(torch.randn(64 * 40, 6).bfloat16(), 64, tmp_path / "arrow")
    in_order, mixed = reads.values()
    assert in_order() == 32 * 64  # whole batches of 32 sequences
    assert mixed() >= 40 * 64


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"steps": -1}, "steps must be at least 0"), ({"rows": 0}, "rows must be at least 1")],
)
def test_configs_that_cannot_be(
    config: LoaderBenchConfig, changes: dict[str, int], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(config, **changes)
