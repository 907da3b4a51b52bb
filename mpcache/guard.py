"""What a store is not believed: names, links and files that others may have put there.

A store is a shared folder. Whatever it says becomes a path only after these checks, so that a
command touches nothing outside it.
"""

import os
import re
import stat
from pathlib import Path, PurePosixPath

LONGEST_NAME = 200  # bytes; below every file system's limit with a temporary file's suffix
_PART = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
_SIDES = ("input", "output")


class DamagedStoreError(OSError):
    """Something in a store is not what was committed; the message names it."""


def printable(text: str) -> str:
    """Text for one line of a terminal: what would steer the terminal is shown as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_hookpoint(name: str) -> bool:
    """Whether a name can be a hookpoint: segments joined by dots, and a plain file name."""
    return (
        "" not in name.split(".")  # so neither `..` nor a hidden file
        and name.isprintable()
        and not re.search(r"[\s/\\:*]", name)
        and len(name.encode(errors="surrogatepass")) <= LONGEST_NAME
    )


def is_acts(array: str) -> bool:
    """Whether a name is that of an activations array: `acts/<hookpoint>/<side>`."""
    steps = array.split("/")
    return len(steps) == 3 and steps[0] == "acts" and is_hookpoint(steps[1]) and steps[2] in _SIDES


def is_part(text: str) -> bool:
    """Whether text is a part's number in its one spelling."""
    return _PART.fullmatch(text) is not None


def check_place(path: Path) -> Path:
    """Refuse a place for a new store, or of a root, whose name would steer a terminal."""
    if not str(path).isprintable():
        raise ValueError(f"a path must be printable, got {str(path)!r}; name another place")
    return path


def locate(store: Path, name: str) -> Path:
    """Path of a store's file, having made sure that no link leads out of the store.

    The store's own folder may be reached by links: that was the user's choice.

    Raises:
        DamagedStoreError: a step below the store is a link, or what is there is no plain file.
    """
    steps = PurePosixPath(name).parts
    assert not {"/", ".."} & set(steps), name
    place, mode = store, stat.S_IFDIR
    for step in steps:
        place = place / step
        try:
            mode = os.lstat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return store / name
        if stat.S_ISLNK(mode):
            raise DamagedStoreError(f"{place} is a symbolic link, which a store must not have")
    if not stat.S_ISREG(mode):
        raise DamagedStoreError(f"{place} is not a plain file")
    return place
