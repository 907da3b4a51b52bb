"""Every command reports too few rows, with both numbers and the reason."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcache.collection.catalog import list_stores
from mpcache.collection.collect import collect
from mpcache.collection.find_store import find_store
from mpcache.parallel.config import CollectParallelConfig
from mpcache.store.collection_extent import extent_of
from mpcache.store.reader import open_store
from mpcache.store.store_info import store_info
from mpcli.mpcache import app
from tests.helpers.stores import small_config, small_store, write_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data for few rows: both of their parts are short."""
    write_corpus(tmp_path / "corpus.jsonl", documents=5)
    (tmp_path / "root").mkdir()
    return tmp_path


def options(folder: Path, rows: int) -> list[str]:
    config = small_config(folder, rows=rows)
    names = ("ctx_len", "part_rows", "chunk_rows", "validation_every", "model_dtype", "device")
    settings = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names]
    return [config.model, config.dataset, "--hookpoints=layers.0", f"--rows={rows}", *settings]


def test_collect_info_and_list_name_both_numbers_and_the_reason(folder: Path) -> None:
    for wanted in (380, 5000):  # as many parts as the dataset has, and more
        arguments = ["collect", *options(folder, wanted), "--root", str(folder / "root")]
        for _ in range(2):  # the second time the store is complete
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            (entry,) = list_stores(folder / "root")
            expected = f"warning: {entry.rows:,} rows of {wanted:,} wanted: the dataset ended"
            assert expected in result.stderr
            assert 0 < entry.rows < 380
    store = str(folder / "root" / entry.store)
    # the rows wanted by an extension are known in units of parts
    rounded_rows = 27 * 192
    assert rounded_rows >= 5000 > rounded_rows - 192
    facts = store_info(store)
    assert (facts["rows_planned"], facts["rows_wanted"], facts["exhausted"]) == (
        entry.rows,
        rounded_rows,
        True,
    )
    assert (entry.rows_wanted, entry.exhausted) == (rounded_rows, True)
    assert entry.complete == pytest.approx(entry.rows / rounded_rows)
    shown = CliRunner().invoke(app, ["info", store])
    assert f"wanted       {rounded_rows:,} rows\n" in shown.stdout
    assert f"{entry.rows:,} rows of {rounded_rows:,} wanted: the dataset ended" in shown.stderr
    listed = CliRunner().invoke(app, ["list", str(folder / "root")])
    assert f"{entry.rows:,} rows of {rounded_rows:,} wanted: the dataset ended" in listed.stderr
    (plain,) = json.loads(CliRunner().invoke(app, ["list", str(folder / "root"), "--json"]).stdout)
    assert (plain["rows"], plain["rows_wanted"], plain["exhausted"]) == (
        entry.rows,
        rounded_rows,
        True,
    )


def test_every_share_names_missing_rows(folder: Path) -> None:
    config = small_config(folder, rows=5000, hookpoints=("layers.0",))
    summaries = [
        collect(config, folder / "store", CollectParallelConfig(share=f"{number}/2"))
        for number in (1, 2)
    ]
    assert all(summary.exhausted for summary in summaries)
    rows = sum(summary.rows for summary in summaries)
    shortfall = f"{rows:,} rows of 5,000 wanted: the dataset ended"
    assert [summary.shortfall for summary in summaries] == [shortfall] * 2


def test_a_complete_store_gives_no_warning(folder: Path) -> None:
    write_corpus(folder / "corpus.jsonl", documents=60)
    config = small_config(folder, rows=500)  # rounded up to three parts
    summary = collect(config, folder / "root/store")
    assert (summary.rows, summary.rows_wanted, summary.exhausted) == (576, 500, False)
    (entry,) = list_stores(folder / "root")
    assert (entry.rows, entry.rows_wanted, entry.complete) == (576, 500, 1.0)
    assert not entry.exhausted
    extent = extent_of(open_store(folder / "root/store"))
    assert extent.is_planned
    done = find_store(folder / "root", config).summary
    assert done is not None
    assert (done.rows, done.rows_wanted, done.shortfall) == (576, 500, None)


def test_parts_of_whole_documents_are_no_end_of_the_dataset(folder: Path) -> None:
    write_corpus(folder / "corpus.jsonl", documents=60)
    config = small_config(folder, rows=384, one_document_per_sequence=True)
    summary = collect(config, folder / "root/store")
    shortfall = f"{summary.rows:,} rows of 384 wanted: parts end where documents do"
    assert (summary.shortfall, summary.exhausted) == (shortfall, False)
    (entry,) = list_stores(folder / "root")
    assert (entry.shortfall, store_info(folder / "root/store")["shortfall"]) == (
        shortfall,
        shortfall,
    )
    assert entry.complete == pytest.approx(entry.rows / 384)
    assert entry.rows < 384


def test_a_collection_that_was_cut_short_is_not_exhausted(tmp_path: Path) -> None:
    path, _ = small_store(tmp_path, rows=576)
    for mark in (path / "marks/2").rglob("*.json"):
        mark.unlink()
    extent = extent_of(open_store(path))
    assert (extent.is_planned, extent.exhausted) == (False, False)
    assert extent.share(2.0 * 192, 192) == pytest.approx(2 / 3)
