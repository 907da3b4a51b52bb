"""The report of `mpcache bench-store`, apart from times, which mean nothing at such small sizes."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mpcache.bench.config import StoreBenchConfig
from mpcache.bench.storage_speed import Seconds, bench_store, measure_cases, plain_case, store_cases
from mpcache.store.zarr_codec import encode_part
from mpcli.mpcache import app

SMALL: dict[str, object] = {
    "rows": 1500, "width": 8, "part_rows": (512,), "chunk_rows": (64,), "repeats": 1, "threads": 2
}  # fmt: skip


def small(**changes: object) -> StoreBenchConfig:
    return StoreBenchConfig(**{**SMALL, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_layout_keeps_and_reads_the_same_rows(tmp_path: Path, dtype: str) -> None:
    config = small(dtype=dtype, chunk_rows=(64, 512), codec=("none", "zstd"))
    cases = store_cases(config)
    layouts = [("none", 64), ("zstd", 64), ("none", 512), ("zstd", 512)]
    assert [(case.spec.codec, case.spec.chunk) for case in cases] == layouts
    x_RW = torch.randn(512, 8).to(getattr(torch, dtype))
    values = x_RW.view(torch.uint16) if dtype == "bfloat16" else x_RW
    for number, case in enumerate([*cases, plain_case(config)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        case.method.write(folder, x_RW, 3)
        assert case.method.read(folder) == 3 * 512
        if case.method.name == "plain file":
            assert (folder / "rows").read_bytes() == 3 * values.numpy().tobytes()
        else:
            encoded = b"".join(encode_part(case.spec, values.numpy()))
            (file,) = folder.rglob(case.spec.object_path(2).removeprefix("arrays.zarr/"))
            assert file.read_bytes() == encoded


def test_rates_and_ratios_are_of_the_same_rows(tmp_path: Path) -> None:
    report = bench_store(small(repeats=2), str(tmp_path))
    assert not any(tmp_path.iterdir()), "nothing is left behind"
    own, plain = report.measurements
    assert (own.write_ratio, own.cold_ratio, own.warm_ratio) == (1, 1, 1)
    assert own.stored > 1
    for row in (own, plain):
        assert row.write_gb_per_second == pytest.approx(row.write_rows_per_second * 16 / 1e9)
        assert row.warm_gb_per_second == pytest.approx(row.warm_rows_per_second * 16 / 1e9)


def test_ratios_are_how_many_times_faster_the_first_method_is() -> None:
    config = small()
    seconds = iter([Seconds(2.0, 3.0, 4.0), Seconds(6.0, 6.0, 2.0)] * 2)
    cases = [*store_cases(config), plain_case(config)]
    _, plain = measure_cases(cases, config, None, lambda *_: (next(seconds), 10)).measurements
    assert (plain.write_ratio, plain.cold_ratio, plain.warm_ratio) == (3, 2, 0.5)
    assert plain.cold_rows_per_second == 1536 / 6


def test_command(tmp_path: Path) -> None:
    options = ["--rows", "300", "--width", "4", "--part-rows", "128", "--chunk-rows", "32,64"]
    options += ["--repeats", "1", "--folder", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench-store", *options])
    assert result.exit_code == 0, result.output
    header, columns, *lines = result.stdout.splitlines()
    assert "300 rows of 4 bfloat16 values" in header
    assert columns.split()[:2] == ["method", "part_rows"]
    assert len(lines) == 2 + 1
    report = json.loads(CliRunner().invoke(app, ["bench-store", *options, "--json"]).stdout)
    assert [row["chunk_rows"] for row in report["measurements"]] == [32, 64, 32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"threads": 0}, "threads must be at least 1"), ({"codec": ()}, "codec is empty")],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
