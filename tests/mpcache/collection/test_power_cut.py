"""The objects of a mark are on the disk before the mark gets its name."""

import json
from pathlib import Path

import pytest

from mpcache.collection.collect import collect
from tests.helpers.disks import Disk
from tests.helpers.stores import small_config


def test_a_mark_appears_after_all_that_it_names_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = small_config(tmp_path, rows=400), tmp_path / "store"
    disk, lost = Disk(monkeypatch), dict[str, set[Path]]()

    def check(claim: Path, name: Path) -> None:
        if name.is_relative_to(store / "marks") and name.suffix == ".json":
            objects = json.loads(claim.read_bytes())["objects"]
            lost[name.relative_to(store).as_posix()] = {
                path for key in objects for path in disk.lost(store / key, store)
            }

    disk.on_name.append(check)
    collect(config, store)
    assert len(lost) == len(list((store / "marks").rglob("*.json")))
    assert not {name: paths for name, paths in lost.items() if paths}
    files = [file for file in store.rglob("*") if file.is_file()]
    assert not {path for file in files for path in disk.lost(file, store)}, "nor later"
    assert not disk.torn
