"""The order of names as people number them: part-2 before part-10."""

import re
from pathlib import PurePath

NaturalKey = tuple[tuple[tuple[bool, int, str], ...], ...]


def natural_key(path: PurePath) -> tuple[NaturalKey, str]:
    """Sorts paths part by part, numbers in them by value; the text decides between 01 and 1."""
    return tuple(_part_key(part) for part in path.parts), path.as_posix()


def _part_key(part: str) -> tuple[tuple[bool, int, str], ...]:
    pieces = [piece for piece in re.split(r"([0-9]+)", part) if piece]
    return tuple((False, int(p), "") if p[0] in "0123456789" else (True, 0, p) for p in pieces)
