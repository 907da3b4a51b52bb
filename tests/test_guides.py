"""The README and the guides are true: links lead somewhere, commands and options exist."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mpcli import mpcache as mpcache_command
from mpcli import mptrain as mptrain_command
from tests.helpers.paths import PROJECT

GUIDES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
COMMANDS: dict[str, Any] = {
    "mpcache": typer.main.get_command(mpcache_command.app),
    "mptrain": typer.main.get_command(mptrain_command.app),
}
# options of other programs that the guides show, and the program
OTHER_OPTIONS = {
    "--nproc-per-node": "torchrun", "--no-python": "torchrun", "--nnodes": "torchrun",
    "--rdzv-endpoint": "torchrun", "--shutdown-timeout": "torchrun", "--signal": "sbatch",
    "--nthreads": "dask", "--memory-limit": "dask", "--no-deps": "pip", "--index-url": "pip",
    "--gres": "sbatch", "--array": "sbatch", "--wrap": "sbatch",
}  # fmt: skip


def blocks(guide: Path, language: str) -> list[str]:
    """The fenced blocks of one language in a guide."""
    return re.findall(rf"^```{language}\n(.*?)^```$", guide.read_text(), re.M | re.S)


def command_lines() -> list[tuple[str, str]]:
    """Every command of this project in a block without a language, with its guide."""
    lines = []
    for guide in GUIDES:
        for block in blocks(guide, ""):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.search(r"\b(mpcache|mptrain) (?!\.).*", line.split("  #")[0])
                if command:
                    lines.append((guide.name, command[0].rstrip("'")))
    return lines


def subcommand(words: list[str]) -> Any:
    """The command that the first two words name."""
    group: Any = COMMANDS[words[0]]
    command = group.get_command(group.context_class(group), words[1])
    assert command is not None, f"there is no command {' '.join(words[:2])}"
    return command


def all_options() -> set[str]:
    names: set[str] = set()
    for program, group in COMMANDS.items():
        for name in group.list_commands(group.context_class(group)):
            for parameter in subcommand([program, name]).params:
                names |= {*parameter.opts, *parameter.secondary_opts}
    return names


@pytest.mark.parametrize(("guide", "line"), command_lines())
def test_a_command_of_a_guide_parses(guide: str, line: str) -> None:
    """`...` stands for further options; the options shown must exist."""
    words = [word for word in shlex.split(line) if word not in ("...", "[STORE]")]
    command, rest = subcommand(words), words[2:]
    is_short = "..." in line
    command.make_context(words[1], rest, resilient_parsing=is_short)
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    options = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert options <= known | {"--help"}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_links_lead_to_files(guide: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", guide.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (guide.parent / target).exists()] == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_options_named_in_the_text_exist(guide: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", guide.read_text(), flags=re.M | re.S)
    spans = re.findall(r"`([^`]+)`", text)
    named = {o for span in spans for o in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}
    assert named - all_options() - OTHER_OPTIONS.keys() - {"--help"} == set()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.name)
def test_files_named_in_the_text_exist(guide: Path) -> None:
    """Paths of this repository in backticks, such as `mptrain/config/coder.py`."""
    folders = "mpcache|mptrain|cli|tests|benchmarks|docs|data"
    named = re.findall(
        rf"`((?:{folders})/[\w./-]+\.(?:py|md|toml|parquet|json))`", guide.read_text()
    )
    real = [name for name in named if "NAME" not in name]
    assert [name for name in real if not (PROJECT / name).exists()] == []


def test_make_targets_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.M))
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    text = "\n".join(guide.read_text() for guide in GUIDES)
    shown = "\n".join(block for guide in GUIDES for block in blocks(guide, ""))
    named = {*re.findall(r"^make ([a-z-]+)", shown, re.M), *re.findall(r"`make ([a-z-]+)", text)}
    assert named <= targets
    extras = {e for group in re.findall(r"\[([a-z0-9,]+)\]'", text) for e in group.split(",")}
    assert extras <= project["optional-dependencies"].keys()


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").symlink_to(PROJECT / "data")
    monkeypatch.chdir(tmp_path)
    (source,) = blocks(PROJECT / "README.md", "python")
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    rows, code = names["rows"], names["code"]
    assert code.idx_BK.shape == (len(rows), 16)  # type: ignore[attr-defined, arg-type]
