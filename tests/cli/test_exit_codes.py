"""The class of an error decides how a command ends: its exit code, and a line or a traceback."""

import errno
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mpcache.errors import DamagedStoreError, UsageError
from mpcli.errors import guarded
from mptrain.runs.signals import Terminated


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/some/path")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("rows must be positive, got 0"), 2, "error: rows must be positive, got 0"),
        (os_error(errno.ENOENT), 2, "error: cannot use /some/path: No such file or directory"),
        (os_error(errno.EACCES), 2, "error: cannot use /some/path: Permission denied"),
        (os_error(errno.ENOSPC), 1, "No space left on device"),
        (ConnectionError("the server is gone"), 1, "error: the server is gone"),
        (DamagedStoreError("part 3 is damaged"), 1, "mpcache repair STORE` restores the data"),
        (
            DamagedStoreError("s/store.json is damaged"),
            1,
            "store.json is damaged; replace store.json by the one of a copy of this store\n",
        ),
        (DamagedStoreError("s is damaged; copy again"), 1, "error: s is damaged; copy again\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated("ended by SIGTERM"), 143, "ended by SIGTERM"),
        (UsageError("a\x1b[31mb"), 2, "error: a\\x1b[31mb"),
    ],
)
def test_an_error_that_a_person_can_mend_is_one_line(
    error: BaseException, code: int, line: str
) -> None:
    result = CliRunner().invoke(app_that_raises(error), [])
    assert result.exit_code == code
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "error", [ValueError("of a library"), RuntimeError("bug"), TypeError("bug"), KeyError("bug")]
)
def test_any_other_error_is_a_defect_with_a_traceback(error: Exception) -> None:
    result = CliRunner().invoke(app_that_raises(error), [])
    assert result.exit_code == 1
    assert result.exception is error, "the interpreter prints the traceback"
    assert not result.stderr


def test_packages_raise_no_bare_value_error_for_what_a_user_sees() -> None:
    """A bare ValueError would end a command with a traceback; the exceptions are caught inside."""
    root = Path(__file__).parents[2]
    bare = {
        str(file.relative_to(root))
        for package in ("mpcache", "mptrain", "cli")
        for file in (root / package).rglob("*.py")
        if "raise ValueError(" in file.read_text()
    }
    assert bare <= CAUGHT_INSIDE


# What a reader of bytes raises. Their callers catch it and name the object as damaged.
CAUGHT_INSIDE = {
    "mpcache/model/file_integrity.py",
    "mpcache/storage/bucket_requests.py",
    "mpcache/storage/local.py",
    "mpcache/store/store_metadata.py",
    "mpcache/store/description.py",
    "mpcache/store/zarr_codec.py",
}


def app_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @guarded
    def command() -> None:
        raise error

    return app
