"""A root finds the right store for a collection, creates it once, and lists its stores."""

import json
import shutil
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcache.collection import find_store as find_store_module
from mpcache.collection.catalog import list_stores
from mpcache.collection.collect import collect
from mpcache.collection.find_store import find_store
from mpcache.maintenance.verify import verify
from mpcache.store.reader import open_store
from mpcache.store.sealed_json import seal, unseal
from mpcli.mpcache import app
from mpcli.reports import format_age
from tests.helpers.models import save_tiny
from tests.helpers.stores import files_of, marks_of, small_config

COLLECT = ("--ctx-len", "16", "--part-rows", "192", "--chunk-rows", "32", "--batch-sequences", "5")
COLLECT += ("--validation-every", "4", "--model-dtype", "float32")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus and a root of one store; tests only read it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "root").mkdir()
    assert run(folder, "600", "layers.0").exit_code == 0
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the original folder that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "place"))


def run(folder: Path, rows: str, hookpoints: str, *more: str):
    small_config(folder)
    named = [str(folder / "model"), str(folder / "corpus.jsonl"), "--root", str(folder / "root")]
    options = ["--rows", rows, "--hookpoints", hookpoints, *COLLECT, *more]
    return CliRunner().invoke(app, ["collect", *named, *options])


def only_store(folder: Path) -> Path:
    (store,) = (f for f in (folder / "root").iterdir() if f.is_dir())
    return store


def no_model(*_: object, **__: object) -> None:
    raise AssertionError("the model's weights were loaded")


def test_the_name_is_readable_and_ends_in_the_fingerprint(original: Path) -> None:
    store = only_store(original)
    assert store.name == f"model-corpus-{open_store(store).fingerprint[:12]}"


def test_complete_already_loads_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(only_store(folder))
    monkeypatch.setattr(find_store_module, "load_model", no_model)
    monkeypatch.setattr("mpcache.collection.producer.load_model", no_model)
    result = run(folder, "600", "layers.0")
    assert result.exit_code == 0, result.output
    assert "the model did not run" in result.stdout
    assert (
        run(folder, "300", "layers.*:output", "--json").exit_code == 1
    )  # the store lacks layers.1
    assert files_of(only_store(folder)) == before


def test_a_store_that_names_no_files_is_found_by_its_fingerprint(folder: Path) -> None:
    file = only_store(folder) / "store.json"
    content = unseal(file.read_bytes(), "store")
    del content["provenance"]["model"]["model_files"]
    file.write_bytes(seal(content))
    target = find_store(folder / "root", small_config(folder, rows=600, hookpoints=("layers.0",)))
    assert target.storage.path == only_store(folder)
    assert target.summary is not None
    assert target.summary.rows == 768


def test_more_rows_and_more_hookpoints_go_into_the_same_store(folder: Path) -> None:
    first = json.loads(run(folder, "1500", "layers.0", "--json").stdout)
    second = json.loads(run(folder, "1500", "layers.0,layers.1.mlp", "--json").stdout)
    assert first["forward_rows"] == first["rows"] - 768
    assert second["forward_rows"] == second["rows"] == first["rows"]
    collect(small_config(folder), folder / "at_once")
    assert marks_of(only_store(folder)) == marks_of(folder / "at_once")


def test_another_dtype_is_refused_and_convert_changes_it(folder: Path) -> None:
    result = run(folder, "600", "layers.0", "--dtype", "float32")
    assert result.exit_code == 2
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "holds these rows, with dtype bfloat16 instead of float32" in message
    command = message.partition("mpcache ")[2].split()[:5]
    assert command[0] == "convert"
    assert CliRunner().invoke(app, command).exit_code == 0
    again = run(folder, "600", "layers.0", "--dtype", "float32")
    assert again.exit_code == 0, again.output
    assert "the model did not run" in again.stdout
    assert "bfloat16" in run(folder, "900", "layers.0", "--dtype", "float32").stderr


def test_codec_and_chunks_of_an_existing_store_are_kept(folder: Path) -> None:
    result = run(folder, "900", "layers.0", "--codec", "zstd")
    assert result.exit_code == 0, result.output
    assert "exists with codec=none; it keeps these settings" in result.stderr
    assert verify(only_store(folder)).findings == ()


def test_other_settings_and_another_model_make_another_store(folder: Path) -> None:
    assert run(folder, "300", "layers.0", "--seed", "1").exit_code == 0
    shutil.rmtree(folder / "model")
    save_tiny(folder / "model", seed=1)
    assert run(folder, "300", "layers.0").exit_code == 0
    assert len(list((folder / "root").iterdir())) == 3


def test_a_renamed_store_is_found_and_links_and_damage_are_not(
    folder: Path, original: Path
) -> None:
    store = only_store(folder)
    store.rename(store.with_name("ours"))
    (folder / "root/link").symlink_to(only_store(original))
    config = small_config(folder, rows=600, hookpoints=("layers.0",))
    assert find_store(folder / "root", config).storage.name == "ours"
    (folder / "root/ours/store.json").write_text("{}")
    assert find_store(folder / "root", config).storage.path == store


def test_an_invalid_root_is_refused(folder: Path) -> None:
    for wrong, message in (
        (only_store(folder), "is a store"),
        (folder / "corpus.jsonl", "a folder"),
    ):
        result = CliRunner().invoke(app, ["list", str(wrong)])
        assert (result.exit_code, message in result.stderr) == (2, True)
    both = CliRunner().invoke(
        app, ["collect", "m", "d", "s", "--root", "r", "--hookpoints", "layers.0"]
    )
    neither = CliRunner().invoke(app, ["collect", "m", "d", "--hookpoints", "layers.0"])
    assert all(
        r.exit_code == 2 and "give either STORE or --root" in r.stderr for r in (both, neither)
    )


@pytest.mark.parametrize("name", ["..", "../..", "a/b", "\x1b[31mred", "", ".hidden", "x" * 400])
def test_any_name_gives_one_plain_folder(name: str) -> None:
    safe = find_store_module.safe_folder_name(name)
    assert Path(safe).name == safe
    assert safe.isascii()
    assert safe.isprintable()
    assert not safe.startswith(".")
    assert 0 < len(safe) <= 48


def test_list_shows_every_store(folder: Path) -> None:
    """Complete, half done and damaged stores; the table and JSON agree."""
    half = folder / "root/half"
    shutil.copytree(only_store(folder), half)
    for part in (2, 3):
        (half / f"marks/{part}/layers.0/output.json").unlink()
    broken = folder / "root/broken\x1b[2J"
    shutil.copytree(half, broken)
    (broken / "store.json").write_text("{")
    (folder / "root/notes").mkdir()
    entries = {entry.store: entry for entry in list_stores(folder / "root")}
    complete = entries[next(name for name in entries if name.startswith("model-"))]
    assert (complete.rows, complete.complete, complete.model) == (768, 1.0, "model")
    assert complete.hookpoints == ("layers.0",)
    assert complete.age_seconds is not None
    assert (entries["half"].rows, entries["half"].complete) == (384, 0.5)
    assert "damaged" in str(entries["broken\x1b[2J"].fault)
    table = CliRunner().invoke(app, ["list", str(folder / "root")])
    assert "\x1b" not in table.output
    assert "50%" in table.stdout
    shown = json.loads(CliRunner().invoke(app, ["list", str(folder / "root"), "--json"]).stdout)
    assert [entry["store"] for entry in shown] == sorted(entries)


def test_age_is_never_negative(folder: Path) -> None:
    """The clock of the machine that wrote may be years ahead."""
    for file in (only_store(folder) / "marks").rglob("*.json"):
        mark = unseal(file.read_bytes(), "mark")
        file.write_bytes(seal({**mark, "time": "2999-01-01T00:00:00+00:00"}))
    (entry,) = list_stores(folder / "root")
    assert entry.age_seconds == 0
    assert [format_age(s) for s in (None, 0, 59, 7200, 200_000)] == [
        "-", "0 s", "59 s", "2 h", "2 d"
    ]  # fmt: skip


def test_a_store_in_a_teams_root_is_writable_by_the_team(folder: Path) -> None:
    (folder / "root").chmod(0o2775)
    assert run(folder, "300", "layers.0", "--seed", "1").exit_code == 0
    new = max((folder / "root").iterdir(), key=lambda f: f.stat().st_mtime)
    assert all(f.stat().st_mode & stat.S_IWGRP for f in [new, *new.rglob("*")])
