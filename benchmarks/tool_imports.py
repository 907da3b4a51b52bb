"""Imports of other tools, which print and warn as they like, and the progress line of a command."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

HOW_TO_INSTALL = "make peers, which creates .venv-peers"


def import_quietly(module: str) -> ModuleType:
    """Import a module; its output goes to standard error, and its warnings are dropped."""
    with without_noise():
        return import_module(module)


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Standard output is for our report, and a warning of another tool is no error of ours."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """No warnings, messages and progress bars of another tool; its errors are raised."""
    with (
        without_noise(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def show_progress(line: str) -> None:
    """Print a line on standard error, over the line before it where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)  # noqa: T201
    else:
        print(line, file=sys.stderr, flush=True)  # noqa: T201
