"""A settings file gives the values of its fields, or an error with file and line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mpcache.errors import UsageError
from mptrain.experiments.toml_config import read_settings


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    sort: Literal["a", "b"] = "a"
    counts: tuple[int, ...] = ()
    share: float | None = None
    is_on: bool = False

    def __post_init__(self) -> None:
        if self.share is not None and self.share > 1:
            raise UsageError(f"share must be at most 1, got {self.share}")


TEXT = """# a comment
[run]
name = "x"
counts = [1, 2]
"""


def read(folder: Path, text: str = TEXT, *changes: str) -> Config:
    (folder / "file.toml").write_text(text)
    return read_settings(folder / "file.toml", changes).build(("run",), Config)


def test_values_are_those_of_the_fields(tmp_path: Path) -> None:
    assert read(tmp_path) == Config(name="x", counts=(1, 2))
    config = read(tmp_path, TEXT, "run.share=1", "run.sort=b", "run.is_on=true", "run.counts=[]")
    assert config == Config(name="x", sort="b", share=1.0, is_on=True)
    assert isinstance(config.share, float)


def test_auto_leaves_a_choice_also_above_a_file_with_a_value(tmp_path: Path) -> None:
    assert read(tmp_path, TEXT + "share = 0.5", "run.share=auto") == read(tmp_path)
    assert read(tmp_path, TEXT, "run.name=auto").name == "auto"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("nmae = 3", r"file.toml, line 5: run.nmae is unknown; did you mean name\? known: name, s"),
        ("is_on = 1", r"file.toml, line 5: run.is_on must be true or false, got 1"),
        ("sort = 'c'", r"line 5: run.sort must be one of a, b, got 'c'"),
        ("share = '1'", "line 5: run.share must be a number or \"auto\", got '1'"),
        ("share = 2", r"line 2: run is invalid: share must be at most 1, got 2.0"),
        ("share = true", r'line 5: run.share must be a number or "auto", got True'),
        ("[two]\n[run.three]", r"line 6: run.three is unknown"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, added: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, TEXT + added)


def test_a_missing_key_is_named_with_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: run.name is missing; set it to text in quotes"):
        read(tmp_path, "[run]")
    with pytest.raises(ValueError, match=r"file.toml: run.name is missing"):
        read(tmp_path, "")
    with pytest.raises(ValueError, match=r"line 1: run must be a table, got 3; write \[run\]"):
        read(tmp_path, "run = 3")


@pytest.mark.parametrize("value", ["[1.5]", "3", "[true]", "x"])
def test_a_list_of_whole_numbers(tmp_path: Path, value: str) -> None:
    with pytest.raises(ValueError, match=r"--set run.counts=.* a list, each item a whole number"):
        read(tmp_path, TEXT, f"run.counts={value}")


def test_malformed_changes_are_refused(tmp_path: Path) -> None:
    for change in ("run.name", "=3", "run..name=3"):
        with pytest.raises(ValueError, match=r"--set must be TABLE.KEY=VALUE"):
            read(tmp_path, TEXT, change)


def test_a_file_over_another(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.toml").write_text(TEXT + "share = 0.5")
    text = 'extends = "below/base.toml"\n[run]\ncounts = [3]\n'
    assert read(tmp_path, text) == Config(name="x", counts=(3,), share=0.5)
    settings = read_settings(tmp_path / "file.toml")
    assert "base.toml, line 5: run.share is" in str(settings.error(("run", "share"), "is"))
    with pytest.raises(ValueError, match="extends itself"):
        read(tmp_path, 'extends = "below/../file.toml"')
    with pytest.raises(ValueError, match="line 1: extends must be a file name in quotes, got 3"):
        read(tmp_path, "extends = 3")
    with pytest.raises(
        ValueError, match=r"nrun.toml cannot be read: .*; give a readable TOML file"
    ):
        read(tmp_path, 'extends = "nrun.toml"')
    with pytest.raises(ValueError, match=r"file.toml cannot be read: .*line 1"):
        read(tmp_path, "a = = 3")


def test_json_of_the_same_tables(tmp_path: Path) -> None:
    content: Any = '{"run": {"name": "x", "share": null, "counts": [1, 2]}}'
    (tmp_path / "file.json").write_text(content)
    config = read_settings(tmp_path / "file.json").build(("run",), Config)
    assert config == Config(name="x", counts=(1, 2))
