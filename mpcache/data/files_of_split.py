"""The files of a downloaded folder that belong to a split, and whether any is missing."""

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
    """The files of the split, by the names of files and folders; all files if no name has a split.

    Raises UsageError where only some names have a split, or where several datasets are mixed.
    """
    splits = {file: split_of_name(file.relative_to(folder)) for file in files}
    with_split = [file for file in files if splits[file]]
    if not with_split:
        return tuple(files)
    if len(with_split) < len(files):
        without_split = next(file for file in files if not splits[file])
        raise UsageError(
            f"all files in {folder.name} or none must have a split in their names, got "
            f"{with_split[0].name} (with a split) and {without_split.name} (without); select the "
            "files to read with a glob or a list with commas in --dataset"
        )
    wanted = _ALIASES.get(split, split)
    chosen = [file for file in files if splits[file] == wanted]
    if not chosen:
        available = ", ".join(dict.fromkeys(str(splits[file]) for file in files))
        raise UsageError(
            f"split must be one of {available} in {folder.name}, got {split}; give one of these "
            "with --split"
        )
    groups = dict.fromkeys(_above_split(file.relative_to(folder)) for file in chosen)
    if len(groups) > 1:
        names = ", ".join(group.as_posix() for group in groups)
        raise UsageError(
            f"{folder.name} holds several datasets with {split} files, in {names}; give one of "
            "these folders as --dataset"
        )
    return tuple(chosen)


def split_of_name(path: Path) -> str | None:
    """The split in a file's name, or in the name of its nearest parent folder that has one."""
    return next(filter(None, map(_split_in, reversed(path.parts))), None)


def _split_in(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((_ALIASES[word] for word in words if word in _ALIASES), None)


def _above_split(path: Path) -> Path:
    """The parent of the file or folder whose name has the split: the folder of one dataset."""
    while not _split_in(path.name):
        path = path.parent
    return path.parent


def check_shards_complete(files: Sequence[Path], folder: Path) -> None:
    """Raise UsageError where names such as a-00000-of-00002 show that files are missing."""
    groups: defaultdict[tuple[Path, str, str], set[int]] = defaultdict(set)
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            name, number, count = match.groups()
            groups[file.parent, name, count].add(int(number))
    for (_, name, count), numbers in groups.items():
        # counted from 0, as the Hub does, or from 1
        candidates = [sorted(set(range(n, n + int(count))) - numbers) for n in (0, 1)]
        if missing := min(candidates, key=len):
            raise UsageError(
                f"{folder.name} must hold {int(count)} shards, got {len(numbers)}: "
                f"{name}-{missing[0]:05}-of-{count} is missing; download the missing files, or "
                "select the files to read with a glob"
            )
