"""Natural order of names, as people number them: part-2 comes before part-10."""

import re
from pathlib import PurePath

NaturalKey = tuple[tuple[bool, int, str], ...]


def natural_key(text: str) -> NaturalKey:
    """Sort key of a text in which numbers count by value. 01 and 1 are equal."""
    pieces = [piece for piece in re.split(r"([0-9]+)", text) if piece]
    return tuple((False, int(p), "") if p[0] in "0123456789" else (True, 0, p) for p in pieces)


def natural_path_key(path: PurePath) -> tuple[tuple[NaturalKey, ...], str]:
    """Sort key of a path, folder by folder. The text decides between 01 and 1."""
    return tuple(natural_key(part) for part in path.parts), path.as_posix()
