"""A model of a disk: what survives a power cut."""

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Follows which files and which folder entries were synced to the disk.

    A file without an fsync may be empty after a power cut. A new name may be gone until its folder
    had an fsync.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.synced: set[int] = set()
        "inodes of the files and folders that had an fsync"
        self.torn: list[Path] = []
        "files, and folders with files, that got a name before all of them had an fsync"
        self.at_risk: set[Path] = set()
        "names whose folder had no fsync since they appeared"
        self.on_name: list[Any] = []
        "functions to call with the source and the target of each new name, before it appears"
        self._lock = threading.Lock()
        for function in ("link", "rename", "replace"):
            self._follow(patch, function)
        make_folder, fsync = os.mkdir, os.fsync

        def mkdir(path: Any, *mode: Any, **options: Any) -> None:
            make_folder(path, *mode, **options)
            with self._lock:
                self.at_risk.add(Path(path))

        def sync(descriptor: int) -> None:
            fsync(descriptor)
            self._count_sync(descriptor)

        patch.setattr(os, "mkdir", mkdir)
        patch.setattr(os, "fsync", sync)

    def _follow(self, patch: pytest.MonkeyPatch, function: str) -> None:
        give_name = getattr(os, function)

        def named(source: Any, target: Any, **options: Any) -> None:
            path = Path(target)
            if (
                not {f.stat().st_ino for f in (Path(source), *Path(source).glob("*"))}
                <= self.synced
            ):
                self.torn.append(path)
            for check in self.on_name:
                check(Path(source), path)
            give_name(source, target, **options)
            with self._lock:
                self.at_risk.add(path)

        patch.setattr(os, function, named)

    def _count_sync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        with self._lock:
            self.synced.add(status.st_ino)
            if stat.S_ISDIR(status.st_mode):
                self.at_risk = {p for p in self.at_risk if not _is_in(p, status.st_ino)}

    def lost(self, path: Path, top: Path) -> set[Path]:
        """The path and its parent folders up to `top`, as far as a power cut may lose them."""
        steps = {path, *(p for p in path.parents if p != top and p.is_relative_to(top))}
        with self._lock:
            return steps & self.at_risk


def _is_in(path: Path, folder: int) -> bool:
    """Whether a path lies in the folder with this inode."""
    try:
        return os.stat(path.parent).st_ino == folder
    except FileNotFoundError:
        return False
