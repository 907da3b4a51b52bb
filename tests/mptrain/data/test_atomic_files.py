"""Files and folders are completely on the disk before they get their names."""

from pathlib import Path

import pytest

from mptrain.data.atomic_files import write_folder, write_json
from tests.helpers.disks import Disk


def test_a_file_outlives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    for content in (1, 2):
        write_json(tmp_path / "a.json", content)
        assert not disk.torn
        assert not disk.lost(tmp_path / "a.json", tmp_path)
    assert (tmp_path / "a.json").read_text() == "2\n"


def test_a_folder_outlives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    for content in ("first", "second"):
        writers = {name: (lambda path, c=content: path.write_text(c)) for name in ("a", "b")}
        write_folder(tmp_path / "folder", writers)
        assert not disk.torn
        assert not disk.lost(tmp_path / "folder", tmp_path)
        assert (tmp_path / "folder/b").read_text() == content
    assert not list(tmp_path.glob("*.partial"))
