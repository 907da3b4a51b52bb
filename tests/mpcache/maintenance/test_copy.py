"""A copy is the same store, half a copy is not a store, and a removal deletes a complete store."""

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcache.errors import DamagedStoreError
from mpcache.maintenance.copy import copy
from mpcache.maintenance.remove import plan_removal, remove
from mpcache.maintenance.verify import verify
from mpcache.storage import atomic_files
from mpcache.storage import local as local_storage
from mpcache.storage.base import open_storage
from mpcache.store.store_metadata import is_store
from mpcli.mpcache import app
from tests.helpers.stores import small_config, small_store


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of a few parts; tests only read it."""
    folder = tmp_path_factory.mktemp("made")
    small_store(folder, rows=600)
    return folder


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(original / "store", tmp_path / "store"))


def all_files(path: Path) -> dict[str, bytes]:
    files = (f for f in path.rglob("*") if f.is_file())
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in files}


def command(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_copy_has_every_byte_and_nothing_else(
    original: Path, store: Path, tmp_path: Path
) -> None:
    (store / "arrays.zarr/tokens/c/0/0.ab12.partial").write_bytes(b"rest")
    (
        store / "marks/2/layers.0/output.json"
    ).unlink()  # without the mark, the objects are not committed
    done = copy(store, tmp_path / "new" / "copy")
    expected = {
        name: data
        for name, data in all_files(store).items()
        if ".partial" not in name and not name.endswith("layers.0/output/c/2/0")
    }
    del expected["arrays.zarr/norms/layers.0/output/c/2"]
    del expected["arrays.zarr/moments/layers.0/output/c/2/0/0"]
    assert all_files(tmp_path / "new/copy") == expected
    assert verify(tmp_path / "new/copy").findings == ()
    assert done.parts == done.written
    small_config(original)
    again = copy(original / "store", tmp_path / "new" / "copy")  # the source has the part by now
    assert again.written == 1
    assert all_files(tmp_path / "new/copy") == all_files(original / "store")


@pytest.mark.parametrize("moment", [1, 2, 7, 20, 45])
def test_a_stopped_copy_is_no_store_and_continues(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    write, calls = atomic_files.write_temporary_file, 0

    def stopped(*args) -> Path:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "write_temporary_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            copy(store, tmp_path / "copy")
    assert not is_store(open_storage(tmp_path / "copy"))
    assert command("info", tmp_path / "copy").exit_code == 2
    copy(store, tmp_path / "copy")
    assert all_files(tmp_path / "copy") == all_files(store)


@pytest.mark.parametrize("harm", ["flip", "cut", "unlink"])
def test_a_damaged_source_is_named_and_not_passed_on(
    store: Path, tmp_path: Path, harm: str
) -> None:
    name = "arrays.zarr/acts/layers.1.mlp/input/c/1/0"
    data = bytearray((store / name).read_bytes())
    (store / name).unlink()
    if harm != "unlink":
        data[100] ^= harm == "flip"
        (store / name).write_bytes(data[: -1 if harm == "cut" else None])
    result = command("copy", store, tmp_path / "copy")
    assert result.exit_code == 1
    assert name in result.stderr
    assert not is_store(open_storage(tmp_path / "copy"))
    assert not (tmp_path / "copy" / name).exists()


def test_invalid_targets_of_copies_are_refused(original: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other, _ = small_store(tmp_path / "elsewhere", rows=300)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.tex").write_text("years of work")
    (store / "arrays.zarr/tokens/c/0/0").write_bytes(b"")
    with pytest.raises(DamagedStoreError):
        copy(store, tmp_path / "half")
    for target, message in (
        (other, "already holds another store"),
        (tmp_path / "work", "is not a store"),
        (original / "store", "must be separate folders, neither inside the other"),
        (original / "store" / "in", "must be separate folders, neither inside the other"),
        (tmp_path / "half", "an unfinished copy of another store"),
        (tmp_path / "bad\x1b[31m", "must be printable"),
    ):
        source = other if target == tmp_path / "half" else original / "store"
        before = all_files(target)
        result = command("copy", source, target)
        assert (result.exit_code, len(result.stderr.splitlines()[-1:])) == (2, 1), result.output
        assert message in result.stderr
        assert all_files(target) == before


def test_remove_asks_and_leaves_nothing(store: Path, tmp_path: Path) -> None:
    before = sorted(f.name for f in tmp_path.iterdir())
    refused = command("remove", store)
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert is_store(open_storage(store))
    assert command("remove", store, "--yes").exit_code == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == [n for n in before if n != "store"]
    assert command("remove", store, "--yes").exit_code == 2


def test_an_interrupted_removal_leaves_no_store_and_continues(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local_storage.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove(plan_removal(store))
    assert not store.exists()
    (rest,) = (f for f in tmp_path.iterdir() if f.name.endswith(".removed"))
    assert not is_store(open_storage(rest))
    assert command("remove", store, "--yes").exit_code == 0
    assert not rest.exists()


def test_only_stores_and_half_copies_are_removed(store: Path, tmp_path: Path) -> None:
    work, link = tmp_path / "work", tmp_path / "link"
    work.mkdir()
    (work / "thesis.tex").write_text("years of work")
    link.symlink_to(store)
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "store.json").write_text('{"format": "mpcache", "format_version": 1}')
    (store / "notes.txt").write_text("mine")
    for path, message in (
        (work, "is not a store"),
        (link, "symbolic link"),
        (fake, "damaged"),
        (store, "'notes.txt'"),
        (tmp_path / "nothing", "is not a store"),
        (tmp_path, "is not a store"),
    ):
        result = command("remove", path, "--yes")
        assert result.exit_code in (1, 2)
        assert message in result.stderr
    assert (work / "thesis.tex").exists()
    assert (store / "notes.txt").exists()
    (store / "notes.txt").unlink()
    os.rename(store / "store.json", store / "store.json.incoming.partial")
    assert command("remove", store, "--yes").exit_code == 0
    assert not store.exists()
