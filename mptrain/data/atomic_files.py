"""Write JSON files, text files and folders so that a crash leaves the old content or the new one.

The content goes to a temporary name, is synced to the disk and is then renamed into place.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError

_PARTIAL = ".partial"
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}

# JSON has no NaN or infinity; null would hide that a run diverged
NONFINITE = ("nan", "inf", "-inf")


def is_partial(path: Path) -> bool:
    """Whether an interrupted write left this file or folder behind."""
    return path.name.endswith(_PARTIAL)


def read_json(path: Path, *, remedy: str = "delete this file") -> Any:
    """Return the content of a JSON file.

    Raises:
        UsageError: the file is not JSON; the message ends with the remedy.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is damaged: it is not JSON ({error}); copy the file again, or {remedy}"
        ) from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json_text(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def write_folder(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Write a folder of files. Each writer gets the path of the file that it writes.

    A folder that exists gets the new files one after another, the last of `writers` first.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _fill(partial, writers)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its room back
        raise
    if folder.exists():
        for name in reversed(writers):
            (partial / name).replace(folder / name)
        partial.rmdir()
    else:
        partial.rename(folder)
    sync(folder.parent)


def _fill(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    folder.mkdir(parents=True)
    for name, write in writers.items():
        write(folder / name)
        sync(folder / name)
    sync(folder)  # the names of the files, before the name of the folder


def sync(path: Path) -> None:
    """Bring a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_text(content: Any) -> str:
    """Return the content as indented JSON, as all JSON files of a run are written."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def json_safe(value: str | float | int | None) -> str | float | int | None:
    """Return the value as JSON can hold it: `nan` and `inf` become strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Raise UsageError in place of an OSError which says that a folder cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise UsageError(
            f"cannot write in {folder}: {error.strerror}; make this folder writable, or give "
            "another folder"
        ) from None
