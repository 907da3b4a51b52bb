"""Atomic file writes: write aside, sync, rename or link, sync the folder.

What is created is as open to the group as the folder that it is created in, so that the folder of a
team decides.
"""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path

from mpcache.storage.temporary_names import temporary_name


def write_temporary_file(path: Path, pieces: Iterable[bytes]) -> Path:
    """Write and sync a new file beside `path`, which is to be renamed or linked to `path`.

    Nothing remains of it after an error. An OSError names `path`, which a full disk does not.
    """
    temporary = path.with_name(temporary_name(path.name, uuid.uuid4().hex))
    try:
        with temporary.open("xb") as file:
            share_with_group(temporary)
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename and error.errno:
            error.filename = str(path)
        raise
    return temporary


def replace_file(path: Path, data: bytes) -> None:
    """Write a file over what is there, all or nothing, so that it outlives a power cut."""
    write_temporary_file(path, [data]).replace(path)
    sync_folder(path.parent)


def create_link(source: Path, path: Path) -> bool:
    """Give a synced file a second name that must not exist yet; False if it does."""
    try:
        os.link(source, path)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        # a file server whose answer was lost is asked again, and finds the link it has just made
        if not path.exists() or not path.samefile(source):
            return False
    sync_folder(path.parent)
    return True


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)
            ) from None
        return  # another process was faster
    share_with_group(folder)


def share_with_group(path: Path) -> None:
    """Give a new file or folder the group permissions of the folder it is in, whatever the umask.

    Not in a folder like /tmp, where anyone may write and files belong to their owners alone.
    """
    above = path.parent.stat().st_mode
    is_for_anyone = above & stat.S_ISVTX and above & stat.S_IWOTH
    if is_for_anyone or not above & stat.S_IWGRP:
        return
    mode = path.stat().st_mode
    group = above & (stat.S_IRWXG if stat.S_ISDIR(mode) else stat.S_IRGRP | stat.S_IWGRP)
    if mode & group != group:
        with contextlib.suppress(PermissionError):  # some file systems know no permissions
            path.chmod(stat.S_IMODE(mode) | group)


def sync_folders(folder: Path, top: Path) -> None:
    """Force the entries of a folder, and of the folders between it and `top`, to the disk."""
    sync_folder(folder)
    while folder != top:
        folder = folder.parent
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Force the entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
