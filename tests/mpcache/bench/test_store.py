"""What `mpcache bench-store` reports: sizes so small that times say nothing, the rest does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mpcache.bench import store as module
from mpcache.bench.store import bench_store
from mpcache.bench.ways import Baseline, saelens
from mpcache.config import StoreBenchConfig
from mpcli.mpcache import app

SMALL: dict[str, object] = {
    "rows": 1500, "width": 8, "part_rows": (512,), "chunk_rows": (64,), "repeats": 1, "threads": 2
}  # fmt: skip


def small(**changes: object) -> StoreBenchConfig:
    return StoreBenchConfig(**{**SMALL, "peers": ("zarr",), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_way_keeps_and_reads_the_same_rows(tmp_path: Path, dtype: str) -> None:
    config = small(dtype=dtype, chunk_rows=(64, 512), codec=("none", "zstd"))
    cases, absent = module._cases(config)
    assert not absent
    layouts = [("none", 64), ("zstd", 64), ("none", 512), ("zstd", 512)]
    assert [(one.spec.codec, one.spec.chunk) for one in cases[:4]] == layouts
    assert [one.way.name.split()[0] for one in cases] == [*["mpcache"] * 4, "plain", *["zarr"] * 4]
    x_RW = torch.randn(512, 8).to(getattr(torch, dtype))
    values = x_RW.view(torch.uint16) if dtype == "bfloat16" else x_RW
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        case.way.write(folder, x_RW, 3)
        assert case.way.read(folder) == 3 * 512
        name = case.spec.object_path(2)
        if case.way.name != "plain file":
            encoded = b"".join(case.spec.encode(values.numpy()))
            (found,) = folder.rglob(name.removeprefix("arrays.zarr/"))
            assert found.read_bytes() == encoded


def test_rates_and_ratios_are_of_the_same_rows(tmp_path: Path) -> None:
    report = bench_store(small(repeats=2), str(tmp_path))
    assert not any(tmp_path.iterdir()), "nothing is left behind"
    ours, *others = report.measurements
    assert (ours.ours_write, ours.ours_cold, ours.ours_warm) == (1, 1, 1)
    assert ours.stored > 1
    for one in [ours, *others]:
        assert one.write_gb_per_second == pytest.approx(one.write_rows_per_second * 16 / 1e9)
        assert one.warm_gb_per_second == pytest.approx(one.warm_rows_per_second * 16 / 1e9)


def test_ratios_are_how_many_times_faster_ours_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([module._Seconds(2.0, 3.0, 4.0), module._Seconds(6.0, 6.0, 2.0)] * 2)
    monkeypatch.setattr(module, "_measure", lambda *_: (next(seconds), 10))
    _, plain = bench_store(small(peers=())).measurements
    assert (plain.ours_write, plain.ours_cold, plain.ours_warm) == (3, 2, 0.5)
    assert plain.cold_rows_per_second == 1536 / 6


def test_what_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Baseline:
        raise ModuleNotFoundError("no", name="sae_lens")

    monkeypatch.setattr(module, "saelens", missing)
    assert module._cases(small(peers=("sae-lens",)))[1] == {
        "sae-lens": "there is no module sae_lens"
    }


def test_zarrs_writes_and_reads_the_same(tmp_path: Path) -> None:
    pytest.importorskip("zarrs")
    case = module._cases(small(peers=("zarrs",), codec=("lz4",)))[0][-1]
    assert "zarrs" in case.way.name
    x_RW = torch.randn(512, 8).bfloat16()
    case.way.write(tmp_path, x_RW, 2)
    assert case.way.read(tmp_path) == 1024


def test_saelens_reads_what_it_wrote(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    way = saelens()
    x_RW = torch.randn(512, 8)
    way.write(tmp_path, x_RW, 3)
    assert way.read(tmp_path) == 3 * 512
    from datasets import load_from_disk

    found = load_from_disk(str(tmp_path / "cache")).with_format("numpy")[1]["rows"]
    np.testing.assert_array_equal(found, x_RW[256:])


def test_command(tmp_path: Path) -> None:
    options = ["--rows", "300", "--width", "4", "--part-rows", "128", "--chunk-rows", "32,64"]
    options += ["--repeats", "1", "--folder", str(tmp_path), "--peers", "zarr"]
    result = CliRunner().invoke(app, ["bench-store", *options])
    assert result.exit_code == 0, result.output
    header, columns, *lines = result.stdout.splitlines()
    assert "300 rows of 4 bfloat16 values" in header
    assert columns.split()[:2] == ["way", "part_rows"]
    assert len(lines) == 2 + 1 + 2
    report = json.loads(CliRunner().invoke(app, ["bench-store", *options, "--json"]).stdout)
    assert [one["chunk_rows"] for one in report["measurements"]] == [32, 64, 32, 32, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": ("arrow",)}, "peers must be of zarr, zarrs, sae-lens, got arrow"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"codec": ()}, "codec is empty"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
