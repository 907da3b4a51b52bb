"""Our format beside other tools: all keep the same rows, and an absent tool is named."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import compare_storage
from benchmarks.other_storage import saelens_cache, zarr_arrays
from mpcache.bench.config import StoreBenchConfig
from mpcache.bench.storage_speed import store_cases
from mpcache.store.zarr_codec import encode_part

SMALL = StoreBenchConfig(rows=1500, width=8, part_rows=(512,), chunk_rows=(64,), codec=("lz4",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zarr_writes_and_reads_the_bytes_of_the_format(tmp_path: Path, dtype: torch.dtype) -> None:
    config = StoreBenchConfig(
        width=8, part_rows=(512,), chunk_rows=(64,), dtype=str(dtype).removeprefix("torch.")
    )
    spec = store_cases(config)[0].spec
    method, x_RW = zarr_arrays(spec, 2), torch.randn(512, 8).to(dtype)
    method.write(tmp_path, x_RW, 3)
    assert method.read(tmp_path) == 3 * 512
    values = x_RW.view(torch.uint16) if dtype == torch.bfloat16 else x_RW
    assert (tmp_path / spec.object_path(2)).read_bytes() == b"".join(
        encode_part(spec, values.numpy())
    )


def test_zarrs_writes_and_reads_the_same(tmp_path: Path) -> None:
    pytest.importorskip("zarrs")
    method = zarr_arrays(store_cases(SMALL)[0].spec, 2, compare_storage._ZARRS_PIPELINE)
    assert "zarrs" in method.name
    method.write(tmp_path, torch.randn(512, 8).bfloat16(), 2)
    assert method.read(tmp_path) == 1024


def test_saelens_reads_what_it_wrote(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    method, x_RW = saelens_cache(), torch.randn(512, 8)
    method.write(tmp_path, x_RW, 3)
    assert method.read(tmp_path) == 3 * 512
    from datasets import load_from_disk

    stored = load_from_disk(str(tmp_path / "cache")).with_format("numpy")[1]["rows"]
    np.testing.assert_array_equal(stored, x_RW[256:])


def test_command(tmp_path: Path) -> None:
    options = ["--rows", "300", "--width", "4", "--part-rows", "128", "--chunk-rows", "32,64"]
    options += ["--repeats", "1", "--folder", str(tmp_path), "--json"]
    result = CliRunner().invoke(compare_storage.app, options)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("loading torch\n")
    report = json.loads(result.stdout)
    names = [row["method"].split()[0] for row in report["measurements"]]
    assert names[:5] == ["mpcache", "mpcache", "plain", "zarr", "zarr"]
    for tool, module in (("zarrs", "zarrs"), ("sae-lens", "sae_lens")):
        assert (tool in report["absent"]) == (find_spec(module) is None)


def test_an_unknown_tool_is_refused() -> None:
    result = CliRunner().invoke(compare_storage.app, ["--tools", "arrow"])
    assert result.exit_code == 2
    assert "got 'arrow'" in result.stderr
