"""Validation of untrusted names and paths.

A store may lie in a shared folder. Names that it holds become paths only after these checks, so
that a command touches nothing outside the store.
"""

import re
from pathlib import Path

from mpcache.errors import UsageError

LONGEST_NAME = 200  # bytes; below every file system's limit with a temporary file's suffix
_PART = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
SIDES = ("input", "output")


def printable(text: str) -> str:
    """Text for one line of a terminal; control characters become escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_hookpoint(name: str) -> bool:
    """Whether a name can be a hookpoint: segments joined by dots, usable as a file name."""
    return (
        "" not in name.split(".")  # so neither `..` nor a hidden file
        and name.isprintable()
        and not re.search(r"[\s/\\:*]", name)
        and len(name.encode(errors="surrogatepass")) <= LONGEST_NAME
    )


def is_acts_array(array: str) -> bool:
    """Whether a name is that of an activations array: `acts/<hookpoint>/<side>`."""
    steps = array.split("/")
    return len(steps) == 3 and steps[0] == "acts" and is_hookpoint(steps[1]) and steps[2] in SIDES


def is_part(text: str) -> bool:
    """Whether text is a part's number in its one spelling."""
    return _PART.fullmatch(text) is not None


def check_printable(path: object) -> None:
    """Raise UsageError for the path of a new store or a root that would steer a terminal."""
    if not str(path).isprintable():
        raise UsageError(f"a path must be printable, got {str(path)!r}; give another path")


def user_path(name: str | Path) -> Path:
    """A path as a user writes it, `~` expanded. Raises UsageError for the `~` of no known user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{name} must not start with ~, because the home folder is unknown on this machine; "
            "give the whole path"
        ) from error
