"""How a command ends: one line for what a person can mend, a traceback for our faults.

0 done · 2 the user's mistake · 1 anything else · 130 interrupted · 143 ended by SIGTERM ·
141 the reader of the output has left, as `head` does (silently, as SIGPIPE ends other programs).
"""

import errno
import functools
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from mpcache.errors import DamagedStoreError, UsageError
from mpcache.validation import printable
from mptrain.runs.signals import Terminated

# what is wrong with the place that was named, not with the disk or the network
_PLACES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT}
_READER_LEFT = 141  # 128 + SIGPIPE
_MENDING = {"verify", "repair"}  # commands


def run_app(app: typer.Typer) -> None:
    """Run a command line as a program; nothing is said where the reader of its output has left."""
    try:
        app()
    except SystemExit as end:
        if end.code not in (1, _READER_LEFT) or not _reader_left():
            raise
        _silence()
        sys.exit(_READER_LEFT)  # typer itself says 1


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command with the exit codes above."""

    @functools.wraps(command)
    def run(**values: object) -> None:
        try:
            command(**values)
        except KeyboardInterrupt as interrupt:
            number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
            _end(str(interrupt) or "interrupted", 128 + number)
        except UsageError as error:  # any other ValueError is a defect: its traceback helps
            _end(f"error: {error}", 2)
        except DamagedStoreError as error:
            _end(f"error: {error}{_remedy(error, command.__name__, values.get('store'))}", 1)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _reader_left():
                _silence()
                raise typer.Exit(_READER_LEFT) from None
            if error.errno in _PLACES:
                _end(f"error: cannot use {error.filename}: {error.strerror}; name another place", 2)
            _end(f"error: {error}", 1)

    return run


@contextmanager
def warnings_in_words() -> Iterator[None]:
    """Print warnings of ours as lines for people: a run goes on, and someone has to act."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = _show
        yield


def _show(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"warning: {printable(str(message))}", err=True)


def _remedy(error: DamagedStoreError, command: str, store: object) -> str:
    """What mends a store; nothing where a command that does so has met the damage."""
    if command in _MENDING:
        return ""
    if "store.json" in str(error):  # nothing else says what it held
        return "; take store.json from a copy of the store"
    name = store if isinstance(store, str) else "STORE"
    return f"; mpcache verify {name} lists what is damaged, mpcache repair {name} collects it again"


def _end(message: str, code: int) -> None:
    typer.echo(printable(message), err=True)
    raise typer.Exit(code) from None


def _reader_left() -> bool:
    """Whether what is printed goes to a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _silence() -> None:
    """Let what is still in buffers go nowhere, also when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
