"""What a store is not believed: names, links and files that others may have put there.

A store lies in a shared place. Whatever it says becomes a path only after these checks, so that a
command touches nothing outside it.
"""

import re
import traceback
from pathlib import Path

LONGEST_NAME = 200  # bytes; below every file system's limit with a temporary file's suffix
_PART = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
_SIDES = ("input", "output")


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


def is_acts_array(array: str) -> bool:
    """Whether a name is that of an activations array: `acts/<hookpoint>/<side>`."""
    steps = array.split("/")
    return len(steps) == 3 and steps[0] == "acts" and is_hookpoint(steps[1]) and steps[2] in _SIDES


def is_part(text: str) -> bool:
    """Whether text is a part's number in its one spelling."""
    return _PART.fullmatch(text) is not None


def check_printable(place: object) -> None:
    """Refuse a place for a new store, or of a root, whose name would steer a terminal."""
    if not str(place).isprintable():
        raise ValueError(f"a path must be printable, got {str(place)!r}; name another place")


def user_path(name: str | Path) -> Path:
    """A path as a user gives it, `~` at its start included. Raises ValueError for no user's `~`."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{name} must begin with a folder, got ~ with no home folder that is known here; "
            "write the whole path"
        ) from error


def is_raised_by_us(error: BaseException) -> bool:
    """Whether a line of this package raised it, rather than a library that it called."""
    last = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    return any(str(f.f_globals.get("__name__", "")).startswith("mpcache.") for f in last)
