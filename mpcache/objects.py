"""Files of a store on a local or shared file system: written whole, synced, found again.

Zarr's LocalStore renames atomically but does not sync, so a power cut can leave a renamed but empty
file; every object is therefore synced here, with its folders, before anything vouches for it.

What is made is as open to the group as the folder that it is made in: a team's root decides.
"""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

_PIECE = 1 << 20
_TEMPORARY = ".partial"  # the suffix of Zarr's own temporary files, so one rule finds both


def put_new(path: Path, data: bytes) -> bool:
    """Write a file that must not exist yet, all or nothing; False if somebody else's is there."""
    if path.exists():  # spares a write, also where nothing can be written; the link decides
        return False
    temporary = prepare(path, [data])
    try:
        return link_new(temporary, path)
    finally:
        temporary.unlink()


def link_new(source: Path, path: Path) -> bool:
    """Give a synced file a second name that must not exist yet; False if it does."""
    try:
        os.link(source, path)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        # a server whose answer was lost is asked again, and then finds the link it has just made
        if not path.exists() or not path.samefile(source):
            return False
    _sync_folder(path.parent)
    return True


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file over what is there, all or nothing.

    Pieces of a megabyte or so are best: on ext4, syncing a file that came in one large write took
    ten times the processor time.
    """
    prepare(path, pieces).replace(path)
    _sync_folder(path.parent)


def prepare(path: Path, pieces: Iterable[bytes]) -> Path:
    """A synced temporary file beside `path`, in a folder that is made where it is missing."""
    make_folders(path.parent)
    return _write_temporary(path, pieces)


def _write_temporary(path: Path, pieces: Iterable[bytes]) -> Path:
    temporary = temporary_name(path, uuid.uuid4().hex)
    try:
        with temporary.open("xb") as file:
            open_to_group(temporary)
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename and error.errno:
            error.filename = str(path)  # a full disk does not say where
        raise
    return temporary


def temporary_name(path: Path, key: str) -> Path:
    """A name beside `path` for what is to become it."""
    return path.with_name(f"{path.name}.{key}{_TEMPORARY}")


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
        return  # somebody was faster
    open_to_group(folder)


def open_to_group(path: Path) -> None:
    """Give what was just made the group's permissions of the folder it is in, umask or not.

    Not below a folder like /tmp, where anyone may write and each keeps to what is theirs.
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
    """Force the entries of a folder, and of those between it and `top`, to the disk."""
    _sync_folder(folder)
    if folder != top:
        sync_folders(folder.parent, top)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """XXH3 of a file's bytes, 128 bits in hexadecimal. Tells damage, not forgery, at disk speed."""
    digest = xxhash.xxh3_128()
    for piece in pieces_of(path):
        digest.update(piece)
    return digest.hexdigest()


def pieces_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def is_temporary(path: Path) -> bool:
    """Whether a file is the rest of an interrupted write, of ours or of Zarr's."""
    return path.name.endswith(_TEMPORARY)


def files_below(top: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders, in a stable order; none if there is no folder.

    A link to a folder counts as a file: what it leads to is not looked at.
    """
    for folder, subfolders, names in os.walk(top):
        links = {name for name in subfolders if os.path.islink(os.path.join(folder, name))}
        subfolders[:] = sorted(set(subfolders) - links)
        for name in sorted([*names, *links]):
            yield Path(folder, name)
