"""Options as environment variables: the command line wins, and errors name the variable."""

import pytest
from typer.testing import CliRunner

from mpcli.mpcache import app as mpcache
from mpcli.mptrain import app as mptrain
from tests.cli.test_help import parse

COLLECT = ["model", "data.jsonl", "store", "--hookpoints", "layers.0"]


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("mpcache", "collect", COLLECT)["rows"] is None
    monkeypatch.setenv("MPCACHE_ROWS", "20k")
    assert parse("mpcache", "collect", COLLECT)["rows"] == 20_000
    assert parse("mpcache", "collect", [*COLLECT, "--rows", "7"])["rows"] == 7


def test_lists_and_switches_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPTRAIN_K", "16,32")
    monkeypatch.setenv("MPTRAIN_BIAS", "0")
    monkeypatch.setenv("MPTRAIN_DRY_RUN", "1")
    values = parse("mptrain", "fit", ["store", "--run", "run", "--hookpoints", "layers.0"])
    assert [tuple(value) for value in values["k"]] == [(16, 32)]
    assert (values["bias"], values["dry_run"]) == (False, True)


def test_a_required_option_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPCACHE_HOOKPOINTS", "layers.0,layers.1")
    values = parse("mpcache", "collect", COLLECT[:3])
    assert [tuple(value) for value in values["hookpoints"]] == [("layers.0", "layers.1")]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MPCACHE_ROWS", "12q", "environment variable MPCACHE_ROWS: must be a whole number"),
        ("MPCACHE_DTYPE", "int4", "environment variable MPCACHE_DTYPE: must be one of bfloat16"),
        ("MPCACHE_ROWS", "0", "got 0 (set by MPCACHE_ROWS in the environment)"),
        ("MPCACHE_CHUNK_ROWS", "50", "(set by MPCACHE_CHUNK_ROWS in the environment)"),
    ],
)
def test_a_wrong_value_names_its_variable(name: str, value: str, message: str) -> None:
    by_variable = CliRunner().invoke(mpcache, ["collect", *COLLECT], env={name: value})
    assert by_variable.exit_code == 2
    assert message in by_variable.stderr
    by_option = CliRunner().invoke(
        mpcache, ["collect", *COLLECT, f"--{name[8:].lower().replace('_', '-')}", value]
    )
    assert by_option.exit_code == 2
    assert "MPCACHE" not in by_option.stderr


def test_variables_of_one_program_are_not_those_of_the_other() -> None:
    fit = ["fit", "store", "--run", "run", "--hookpoints", "layers.0"]
    done = CliRunner().invoke(mptrain, fit, env={"MPCACHE_ROWS": "12q", "MPTRAIN_ROWS": "13q"})
    assert "MPTRAIN_ROWS" in done.stderr
    assert "12q" not in done.stderr


@pytest.mark.parametrize(
    ("command", "words", "name"),
    [
        ("remove", ["store"], "yes"),
        ("repair", ["store"], "delete_leftovers"),
        ("repair", ["store"], "accept_other_bits"),
    ],
)
def test_what_deletes_or_replaces_is_never_taken_from_the_environment(
    command: str, words: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"MPCACHE_{name.upper()}", "1")
    assert not parse("mpcache", command, words)[name]
