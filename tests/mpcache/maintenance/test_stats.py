"""Statistics of a store agree with a float64 pass over all its rows, on any machine."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mpcache.errors import DamagedStoreError
from mpcache.maintenance.stats import save_dimensions, stats
from mpcache.parallel.config import ParallelConfig
from mpcache.storage.base import open_storage
from mpcache.store.reader import open_store
from mpcache.store.writer import Writer
from mpcli.mpcache import app
from tests.helpers.commands import fast_starting_workers
from tests.helpers.stores import SIDES, rows_of, small_store

LAST = "arrays.zarr/moments/layers.0/output/c/2/0/0"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose last parts are short; tests only read it."""
    return small_store(tmp_path_factory.mktemp("made"), rows=1_000_000)[0]


def all_rows(path: Path, side: tuple[str, str]) -> np.ndarray:
    store = open_store(path)
    both = [rows_of(store, side, split) for split in ("train", "validation")]
    return torch.cat(both).double().numpy()


def test_moments_of_each_dimension(original: Path, tmp_path: Path) -> None:
    """The file of the command has these moments to the last few bits."""
    out = tmp_path / "dimensions.safetensors"
    result = CliRunner().invoke(app, ["stats", str(original), "--out", str(out)])
    assert result.exit_code == 0, result.output
    tensors = load_file(out)
    assert len(tensors) == 3 * len(SIDES)
    for hookpoint, side in SIDES:
        rows = all_rows(original, (hookpoint, side))
        name = f"{hookpoint}/{side}"
        assert tensors[f"{name}/finite_rows"] == len(rows)
        assert tensors[f"{name}/mean"].dtype == np.float64
        np.testing.assert_allclose(tensors[f"{name}/mean"], rows.mean(0), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(tensors[f"{name}/variance"], rows.var(0), rtol=1e-12)


def test_a_folder_that_is_missing_is_said_before_the_work(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "none" / "dimensions.safetensors"
    result = CliRunner().invoke(app, ["stats", str(original), "--out", str(out)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --out must be in a folder that exists, got ")
    assert "stats:" not in result.stderr


def test_numbers_of_each_side(original: Path) -> None:
    for side_report in stats(original):
        statistics = side_report.stats
        rows = all_rows(original, (statistics.hookpoint, statistics.side))
        norms = np.linalg.norm(rows, axis=1)
        assert statistics.rows == len(rows)
        assert statistics.largest == np.abs(rows).max()
        assert statistics.mean_norm == pytest.approx(np.linalg.norm(rows.mean(0)), rel=1e-12)
        assert statistics.variance == pytest.approx(rows.var(0).sum(), rel=1e-12)
        for quantile, share in (
            (statistics.norm_median, 0.5),
            (statistics.norm_99, 0.99),
            (statistics.norm_largest, 1),
        ):
            expected = np.quantile(norms, share, method="inverted_cdf")
            assert expected * (1 - 2**-7) <= quantile <= expected * (1 + 1e-6)
        rms = np.sqrt((rows**2).mean(0))
        wanted_outliers = np.flatnonzero(rms > 10 * torch.from_numpy(rms).median().numpy())
        assert list(statistics.outlier_dimensions) == list(wanted_outliers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Dask's sockets
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(threads=1), ParallelConfig(threads=4), ParallelConfig(workers=2)],
    ids=str,
)
def test_statistics_do_not_depend_on_parallelism(original: Path, parallel: ParallelConfig) -> None:
    with fast_starting_workers():
        sides = stats(original, parallel)
    for actual, expected in zip(sides, stats(original, ParallelConfig(threads=1)), strict=True):
        assert actual.stats == expected.stats
        assert torch.equal(actual.moments.mean_W, expected.moments.mean_W)
        assert torch.equal(actual.moments.variance_W, expected.moments.variance_W)


def test_a_mean_far_from_zero_and_rows_that_are_not_finite(original: Path, tmp_path: Path) -> None:
    """Means for which sums of squares would lose all digits; parts of unlike sizes; outliers."""
    shutil.copytree(original, tmp_path / "store")
    shutil.rmtree(tmp_path / "store/marks")
    shutil.rmtree(tmp_path / "store/arrays.zarr")
    store, draw = open_store(original), np.random.default_rng(0)
    writer = Writer(open_storage(tmp_path / "store"), store.layout, store.fingerprint)
    scale = np.array([1e-3, 1, 1, 1, 1, 1, 1, 500.0])
    parts = []
    for part, count in enumerate((192, 192, 192, 17)):
        x_RW = draw.normal(1e4 * (np.arange(8) == 1), scale, (count, 8))
        parts.append(torch.from_numpy(x_RW).bfloat16())
        parts[-1][draw.integers(count), 3] = float("inf")
        parts[-1][draw.integers(count), 4] = float("nan")
        writer.commit_rows(part, np.arange(count))
        writer.commit_acts(part, "acts/layers.0/output", parts[-1])
    rows = torch.cat(parts).double().numpy()
    finite = rows[np.isfinite(rows).all(1)]
    (side_report,) = stats(tmp_path / "store")
    assert side_report.moments.rows == len(finite)
    np.testing.assert_allclose(side_report.moments.mean_W, finite.mean(0), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(
        side_report.moments.variance_W, finite.var(0), rtol=1e-12, atol=1e-20
    )
    assert side_report.stats.nonfinite == (~np.isfinite(rows)).sum() == 8
    assert side_report.stats.outlier_dimensions == (1, 7)
    save_dimensions([side_report], tmp_path / "dimensions")
    assert load_file(tmp_path / "dimensions")["layers.0/output/finite_rows"] == len(finite)


def test_damage_is_an_error_and_never_averaged(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "store")
    data = (tmp_path / "store" / LAST).read_bytes()
    (tmp_path / "store" / LAST).write_bytes(data[:-9] + b"\0" + data[-8:])
    with pytest.raises(DamagedStoreError, match=r"moments/layers\.0/output"):
        stats(tmp_path / "store")


def test_json_is_that_of_the_table(original: Path) -> None:
    result = CliRunner().invoke(app, ["stats", str(original), "--json"])
    assert [side_report["width"] for side_report in json.loads(result.stdout)] == [16, 16, 16]
