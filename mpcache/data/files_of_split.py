"""Which files of a downloaded folder are those of a split, and whether all of them are there."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mpcache.errors import UsageError

_ALIASES = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_NUMBERED = re.compile(r"(.*?)-(\d{5})-of-(\d{5}).*")


def files_of_split(files: Sequence[Path], folder: Path, split: str) -> tuple[Path, ...]:
    """Those of the split where names of files or folders tell splits, else all.

    Raises UsageError where only some tell, or where the files are those of several datasets.
    """
    splits = {file: split_of_name(file.relative_to(folder)) for file in files}
    named = [file for file in files if splits[file]]
    if not named:
        return tuple(files)
    if len(named) < len(files):
        other = next(file for file in files if not splits[file])
        raise UsageError(
            f"files in {folder.name} must all name a split or none, got {named[0].name} and "
            f"{other.name}; name those to read with a glob, or with commas"
        )
    wanted = _ALIASES.get(split, split)
    chosen = [file for file in files if splits[file] == wanted]
    if not chosen:
        there = ", ".join(dict.fromkeys(str(splits[file]) for file in files))
        raise UsageError(f"split must be one of {there} in {folder.name}, got {split}")
    groups = dict.fromkeys(_above_split(file.relative_to(folder)) for file in chosen)
    if len(groups) > 1:
        names = ", ".join(group.as_posix() for group in groups)
        raise UsageError(
            f"{folder.name} holds several datasets, {split} files are in {names}; "
            "name one of these folders"
        )
    return tuple(chosen)


def split_of_name(path: Path) -> str | None:
    """The split that a file's name tells, else one of the folders that it lies in."""
    return next(filter(None, map(_split_in, reversed(path.parts))), None)


def _split_in(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((_ALIASES[word] for word in words if word in _ALIASES), None)


def _above_split(path: Path) -> Path:
    """The folder of the file or folder whose name tells the split: that of one dataset."""
    while not _split_in(path.name):
        path = path.parent
    return path.parent


def complete(files: Sequence[Path], folder: Path) -> None:
    """Raise UsageError where names such as a-00000-of-00002 tell of files that are not there."""
    groups: defaultdict[tuple[Path, str, str], set[int]] = defaultdict(set)
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            name, number, count = match.groups()
            groups[file.parent, name, count].add(int(number))
    for (_, name, count), numbers in groups.items():
        # counted from 0, as the Hub does, or from 1
        lacking = [set(range(first, first + int(count))) - numbers for first in (0, 1)]
        lacking.sort(key=len)
        if missing := sorted(lacking[0]):
            raise UsageError(
                f"{folder.name} must hold {int(count)} shards, got {len(numbers)}: "
                f"{name}-{missing[0]:05}-of-{count} is missing; download the rest, or name "
                "those to read with a glob"
            )
