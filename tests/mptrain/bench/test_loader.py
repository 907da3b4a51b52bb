"""The loader's benchmark counts rows and bytes right; speeds are not tested."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from mpcache.store.reader import open_store
from mpcli.mptrain import app
from mptrain.bench.config import LoaderBenchConfig
from mptrain.bench.loader import bench_loader, measure_mixing, read_bare, read_with_loader
from tests.helpers.stores import small_store

SIDES = (("layers.0", "output"), ("layers.1.mlp", "output"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> LoaderBenchConfig:
    store = small_store(tmp_path_factory.mktemp("bench"))[0]
    return LoaderBenchConfig(
        store=str(store), rows=700, batch_rows=64, window_rows=128, read_threads=2,
        repeats=1, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("sides", [SIDES[:1], SIDES])
def test_both_read_the_same_chunks(
    config: LoaderBenchConfig, sides: tuple[tuple[str, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # whole windows: what the loader reads ahead beyond them is a matter of timing
    config = dataclasses.replace(config, rows=5 * config.window_rows)
    store = open_store(config.store)
    read, chunks_read = store.acts.read_chunk, []

    def watched(*chunk: object) -> torch.Tensor:
        chunks_read.append(chunk[:4])
        return read(*chunk)

    monkeypatch.setattr(store.acts, "read_chunk", watched)
    rows = read_bare(config, store, sides)
    bare, chunks_read[:] = list(chunks_read), []
    assert rows == config.rows
    assert len(bare) == len(sides) * rows / 32
    assert read_with_loader(config, store, sides) == config.rows
    assert set(bare) <= set(chunks_read)


def test_mixing_counts_sequences(config: LoaderBenchConfig) -> None:
    store = open_store(config.store)
    mixing = {
        rows: measure_mixing(dataclasses.replace(config, window_rows=rows), store, SIDES[:1], 48)
        for rows in (32, 128, 2000)
    }
    assert mixing[32].sequences == sum(p.rows for p in store.parts(SIDES[:1], "train")) // 16
    # a part has 12 sequences; a window of a chunk is of one part, and a batch of two windows
    assert mixing[32].distinct <= 24 < mixing[128].distinct < mixing[2000].distinct
    assert mixing[2000].share == pytest.approx(1, abs=0.05)


def test_report_and_command(config: LoaderBenchConfig) -> None:
    report = bench_loader(dataclasses.replace(config, steps=2, k=2, expansion=2))
    readings = {row.method: row for row in report.readings}
    assert readings["loader"].loader_ratio == 1
    assert readings["bare decode"].rows_per_second > 0
    assert [row.arch for row in report.waiting] == ["mp", "topk"]
    assert all(row.waited_seconds < row.store_seconds for row in report.waiting)
    call = ["bench-loader", config.store, "--rows", "600", "--batch-rows", "64", "--repeats", "1"]
    shown = CliRunner().invoke(app, call)
    assert "bare decode" in shown.stdout
    assert "distinct" in shown.stdout
    printed = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert printed["bench"]["batch_rows"] == 64
    assert printed["waiting"] == []


def test_several_hookpoints_are_read_and_trained_together(config: LoaderBenchConfig) -> None:
    names = tuple(name for name, _ in SIDES)
    report = bench_loader(dataclasses.replace(config, hookpoints=names, steps=1, k=2, expansion=2))
    assert report.readings[0].rows == 640
    assert [row.steps for row in report.waiting] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": -1}, "steps must be at least 0"), ({"rows": 0}, "rows must be at least 1")],
)
def test_refuses(config: LoaderBenchConfig, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)
