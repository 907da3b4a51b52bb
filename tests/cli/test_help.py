"""`--help` of every command: light, in groups, no wider than the terminal, with examples."""

import re
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from mpcli import mpcache, mptrain
from mpcli.option_groups import GROUPS

APPS = {"mpcache": mpcache, "mptrain": mptrain}
COMMANDS = [(name, command) for name, app in APPS.items() for command in app.COMMANDS]
HEAVY = (
    "torch",
    "zarr",
    "numpy",
    "transformers",
    "datasets",
    "matplotlib",
    "dask",
    "pydantic",
)


def help_of(app: str, *command: str, width: int = 80) -> str:
    done = CliRunner().invoke(APPS[app].app, [*command, "--help"], terminal_width=width)
    assert done.exit_code == 0, done.output
    return done.stdout


def sections(text: str) -> dict[str, str]:
    """The body under each heading; a heading is at the start of a line and ends with a colon."""
    bodies: dict[str, str] = {}
    heading = ""
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line[:-1]
            assert heading not in bodies, heading
        bodies[heading] = bodies.get(heading, "") + line + "\n"
    return bodies


@pytest.mark.parametrize(("app", "command"), [("mpcache", ""), ("mptrain", ""), *COMMANDS])
def test_help_is_light(app: str, command: str) -> None:
    """`--help` imports neither torch nor zarr, nor anything else that is slow."""
    code = (
        f"import sys; from mpcli.{app} import app\n"
        f"try: app([*{[command] if command else []}, '--help'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = set({HEAVY}) & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("Examples:" if command else "Commands:") in done.stdout


@pytest.mark.parametrize("app", APPS)
def test_the_list_of_commands_imports_none(app: str) -> None:
    code = (
        f"import sys; from mpcli.{app} import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any('_commands.' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
    listed = sections(help_of(app, width=120))["Commands"]
    assert [line.split()[0] for line in listed.splitlines()[1:]] == list(APPS[app].COMMANDS)


@pytest.mark.parametrize(("app", "command"), COMMANDS)
def test_help_of_a_command_is_grouped_and_ends_with_examples(app: str, command: str) -> None:
    bodies = sections(help_of(app, command))
    *groups, last = [name for name in bodies if name]
    assert last == "Examples"
    assert groups == sorted(groups, key=GROUPS.index)
    assert "" in bodies
    summary = APPS[app].COMMANDS[command].summary
    assert summary in " ".join(bodies[""].split())
    match = re.search(r"example (\S+) by (\S+)\.", " ".join(bodies[groups[-1]].split()))
    assert match is not None
    option, variable = match.groups()
    assert f"  {option}" in "".join(bodies[group] for group in groups)
    assert variable == f"{app.upper()}_{option[2:].replace('-', '_').upper()}"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("app", "command"), COMMANDS)
def test_help_is_no_wider_than_the_terminal(app: str, command: str, width: int) -> None:
    examples = APPS[app].COMMANDS[command].examples
    lines = help_of(app, command, width=width).splitlines()
    assert all(len(line) <= width for line in lines if line.strip() not in examples)


@pytest.mark.parametrize(
    ("app", "command", "example"),
    [(a, c, e) for a, c in COMMANDS for e in APPS[a].COMMANDS[c].examples],
)
def test_examples_parse(app: str, command: str, example: str) -> None:
    program, name, *arguments = shlex.split(example)
    assert (program, name) == (app, command)
    assert parse(app, command, arguments)


def parse(app: str, command: str, arguments: list[str]) -> dict[str, object]:
    group = typer.main.get_command(APPS[app].app)
    with group.make_context(app, [], resilient_parsing=True) as context:
        subcommand = group.get_command(context, command)
        assert subcommand is not None
        return subcommand.make_context(command, list(arguments), parent=context).params


@pytest.mark.parametrize("command", [("mpcache", "collect"), ("mptrain", "fit")])
def test_eight_options_come_first_each_with_an_example(command: tuple[str, str]) -> None:
    first = sections(help_of(*command, width=120))["Set these first"]
    options = [line.split()[0] for line in first.splitlines() if line.startswith("  --")]
    assert len(options) == 8
    assert " ".join(first.split()).count("example: --") == 8


@pytest.mark.parametrize("app", APPS)
def test_version(app: str) -> None:
    done = CliRunner().invoke(APPS[app].app, ["--version"])
    assert done.stdout.strip().count(".") == 2
