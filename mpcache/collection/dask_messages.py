"""What a collection and its Dask workers send each other.

Workers return what happened instead of raising it, so that no exception has to cross machines.
"""

import errno
import os
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpcache.config import CollectConfig
from mpcache.errors import UsageError

FailureKind = Literal["usage", "storage", "fault", "stopped"]

# A full disk, or storage that refuses writes, fails for every part: the collection ends at once.
_STORAGE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CollectionSpec:
    """What all tasks of one collection have in common."""

    run: str
    "identifies the collection among those that use the same workers"
    config: CollectConfig
    address: str
    "of the store, from any working directory and any machine that shares its folder or bucket"
    fingerprint: str = ""
    "of the store, once it exists"
    threads: int | None = None
    "torch's threads in each process; None keeps torch's default"
    devices: tuple[str, ...] = ()
    "device of each worker, by its number; empty: the device of the config"


@dataclass(frozen=True)
class PartDone:
    """A part is committed."""

    bytes: int
    "of values that this task committed"


@dataclass(frozen=True)
class Failure:
    """A task that failed: what happened, and where."""

    kind: FailureKind
    message: str
    host: str = ""
    worker: str = ""
    "address of the worker"
    is_setup: bool = False
    "this worker cannot serve the collection at all; another worker may"
    errno: int | None = None
    filename: str | None = None

    @property
    def description(self) -> str:
        """The message, and the machine where it happened."""
        machine = self.host or self.worker
        return f"{self.message} on {machine}" if machine else self.message

    def as_exception(self) -> Exception:
        """The exception that the collection raises for this failure."""
        if self.kind == "stopped":
            return ConnectionError("another command stopped this collection")
        if self.kind == "usage":
            return UsageError(self.message)
        if self.errno is not None:
            return OSError(self.errno, os.strerror(self.errno), self.filename)
        return OSError(self.description)


class StoppedError(Exception):
    """The collection was interrupted."""


class SetupError(Exception):
    """This worker cannot serve a collection. The cause says why."""


def describe_failure(error: Exception, worker: str) -> Failure:
    """What a worker returns when a task raised an error."""
    cause = error.__cause__ if isinstance(error, SetupError) and error.__cause__ else error
    kind = _kind(cause)
    return Failure(
        kind,
        str(cause) if kind in ("usage", "storage") else _one_line(cause),
        socket.gethostname(),
        worker,
        isinstance(error, SetupError),
        getattr(cause, "errno", None),
        getattr(cause, "filename", None),
    )


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, StoppedError):
        return "stopped"
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        return "storage"
    return "usage" if isinstance(error, UsageError) else "fault"


def _one_line(error: BaseException) -> str:
    """Type, first line and source line of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else "no message"
    source = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return f"{type(error).__name__}: {message} ({source})"
