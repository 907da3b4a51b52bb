"""Exit codes and error lines of commands. The class of an error decides both.

| error                                      | exit code | standard error                       |
|--------------------------------------------|-----------|--------------------------------------|
| UsageError                                 | 2         | one line                             |
| OSError: a path that cannot be used        | 2         | one line                             |
| DamagedStoreError                          | 1         | one line, with the command to repair |
| other OSError (full disk, lost server)     | 1         | one line                             |
| KeyboardInterrupt                          | 130       | one line                             |
| Terminated (SIGTERM)                       | 143       | one line                             |
| the reader of the output ended, as `head`  | 141       | nothing                              |
| any other error is a defect                | 1         | traceback                            |
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
from mpcache.untrusted_names import printable
from mptrain.runs.signals import Terminated

# The path that the user named is at fault, and not the disk or the network.
_PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT}
_READER_LEFT = 141  # 128 + SIGPIPE
_REPAIRING = {"verify", "repair"}  # commands


def run_app(app: typer.Typer) -> None:
    """Run a command line as a program. It ends silently if the reader of its output has ended."""
    try:
        app()
    except SystemExit as end:
        if end.code not in (1, _READER_LEFT) or not _reader_left():
            raise
        _silence()
        sys.exit(_READER_LEFT)  # typer's own code is 1


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the exit codes and the error lines above."""

    @functools.wraps(command)
    def run(**values: object) -> None:
        try:
            command(**values)
        except KeyboardInterrupt as interrupt:
            number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
            _end(str(interrupt) or "interrupted", 128 + number)
        except UsageError as error:
            _end(f"error: {error}", 2)
        except DamagedStoreError as error:
            _end(f"error: {error}{_remedy(error, command.__name__, values.get('store'))}", 1)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _reader_left():
                _silence()
                raise typer.Exit(_READER_LEFT) from None
            if error.errno in _PATH_ERRORS and error.filename is not None:
                _end(f"error: cannot use {error.filename}: {error.strerror}; give another path", 2)
            _end(f"error: {error}", 1)

    return run


@contextmanager
def warnings_in_words() -> Iterator[None]:
    """Print RuntimeWarnings as lines: the run continues, but its user should know."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = _show
        yield


def _show(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"warning: {printable(str(message))}", err=True)


def _remedy(error: DamagedStoreError, command: str, store: object) -> str:
    """The commands that repair a store; nothing where the message ends with its own remedy, or
    where one of these commands found the damage.
    """
    if "; " in str(error):
        return ""
    if "store.json" in str(error):  # repair cannot compute it
        return "; replace store.json by the one of a copy of this store"
    if command in _REPAIRING:
        return ""
    name = store if isinstance(store, str) else "STORE"
    return f"; `mpcache verify {name}` lists all damage, `mpcache repair {name}` restores the data"


def _end(message: str, code: int) -> None:
    typer.echo(printable(message), err=True)
    raise typer.Exit(code) from None


def _reader_left() -> bool:
    """Whether the output goes to a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _silence() -> None:
    """Drop what is still in buffers, also when the interpreter ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            os.dup2(null, stream.fileno())
