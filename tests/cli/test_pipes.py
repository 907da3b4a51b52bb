"""A reader that leaves early, as `head` does, ends a command quietly."""

import os
import subprocess
import sys

import pytest

from tests.helpers.stores import small_store

CLI = "from mpcli.{} import main; main()"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("pipes"), rows=600)[0])


@pytest.mark.parametrize(
    ("command", "words", "closed"),
    [
        ("mpcache", ["info", "STORE"], "stdout"),
        ("mpcache", ["info", "STORE/none"], "stderr"),
        ("mpcache", ["--help"], "stdout"),
        ("mptrain", ["presets"], "stdout"),
    ],
)
def test_a_closed_pipe_ends_a_command_quietly(
    store: str, command: str, words: list[str], closed: str
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [word.replace("STORE", store) for word in words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writing}
    done = subprocess.run(
        [sys.executable, "-c", CLI.format(command), *words],
        check=False, text=True, **streams,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 141
    assert not done.stderr
    assert not done.stdout


def test_a_pipe_in_a_shell(store: str) -> None:
    """The first line arrives, and no error is printed."""
    info = f"{sys.executable} -c '{CLI.format('mpcache')}' info {store} --json"
    done = subprocess.run(
        ["bash", "-c", f"{info} | head -n 1"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""
