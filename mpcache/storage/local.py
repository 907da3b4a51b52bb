"""A store in a folder of a local or shared file system: files written whole, synced, found again.

Zarr's LocalStore renames atomically but does not sync, so a power cut can leave a renamed but empty
file; every object is therefore synced here, with its folders, before anything vouches for it.

What is made is as open to the group as the folder that it is made in: a team's root decides.
No path is used before it is certain that no link in the folder leads out of it.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mpcache.errors import DamagedStoreError
from mpcache.storage.tempfiles import PIECE_BYTES, is_temporary, temporary_name
from mpcache.validation import user_path

# Linux fills no more at a time: bytes (2 GiB), buffers (IOV_MAX)
_CALL, _CALL_BUFFERS = 1 << 30, 1024
_REST = r"\.{}\.[0-9a-f]{{32}}\.removed"


class LocalStorage:
    """A place on a file system; mpcache.storage.base has the contract."""

    concurrency = 1
    max_object_bytes: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __reduce__(self) -> "tuple[type[LocalStorage], tuple[Path]]":
        return LocalStorage, (Path(self.address),)  # elsewhere the working directory is another one

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def address(self) -> str:
        return str(user_path(self.path).absolute())

    def child(self, name: str) -> "LocalStorage":
        return LocalStorage(self.path / name)

    def children(self) -> list[str]:
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []

    def is_within(self, other: object) -> bool:
        return isinstance(other, LocalStorage) and self.path.resolve().is_relative_to(
            other.path.resolve()
        )

    def exists(self, name: str = "") -> bool:
        return os.path.lexists(self.path / name)

    def is_link(self, name: str = "") -> bool:
        return (self.path / name).is_symlink()

    def can_be_root(self) -> bool:
        return self.path.is_dir() or not self.path.exists()

    def size(self, name: str) -> int | None:
        found = self._look(name)
        if found is None:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise DamagedStoreError(f"{self.path / name} is not a plain file")
        return found.st_size

    def object_names(self, prefix: str = "") -> Iterator[str]:
        self._look(prefix)
        for file in _files_below(self.path / prefix):
            yield file.relative_to(self.path).as_posix()

    def read(self, name: str) -> bytes:
        return self.checked_path(name).read_bytes()

    def read_pieces(self, name: str) -> Iterator[bytes]:
        with self.checked_path(name).open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
                if is_temporary(name):
                    _forget(file)

    def read_into(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        descriptor = os.open(self._readable(name), os.O_RDONLY)
        try:
            for some in _calls(buffers):
                offset = _fill(descriptor, some, offset)
        finally:
            os.close(descriptor)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  holds a path; a look at each step takes long
    def _readable(self, name: str) -> Path:
        """Path of an object for reading pieces of it; that no link leads to it is seen once."""
        return self.checked_path(name)

    def create(self, name: str, data: bytes) -> bool:
        path = self.checked_path(name)
        if path.exists():  # spares a write, also where nothing can be written; the link decides
            return False
        make_folders(path.parent)
        temporary = _write_temporary(path, [data])
        try:
            return _create_link(temporary, path)
        finally:
            temporary.unlink()

    def replace(self, name: str, data: bytes) -> None:
        path = self.checked_path(name)
        _write_temporary(path, [data]).replace(path)
        sync_folders(path.parent, path.parent)

    def write_temporary(self, name: str, key: str, pieces: Iterable[bytes]) -> str:
        path, temporary = self.checked_path(name), temporary_name(name, key)
        make_folders(path.parent)
        # another who copies the same may be writing under the same key
        _write_temporary(path, pieces).replace(self.checked_path(temporary))
        return temporary

    def publish(self, temporary: str, name: str) -> bool:
        path = self.checked_path(name)
        make_folders(path.parent)
        try:
            self.checked_path(temporary).replace(path)
        except FileNotFoundError:
            return False
        return True

    def create_copy(self, source: str, name: str) -> bool:
        path = self.checked_path(name)
        make_folders(path.parent)
        return _create_link(self.checked_path(source), path)

    def delete(self, name: str) -> None:
        self.checked_path(name).unlink(missing_ok=True)

    def sync(self, name: str, top: str = "") -> None:
        folder = (self.path / name).parent
        if folder.is_dir():
            sync_folders(folder, self.path / top)

    def removal_leftovers(self) -> "tuple[LocalStorage, ...]":
        pattern = re.compile(_REST.format(re.escape(self.path.name)))
        above = LocalStorage(self.path.parent)
        found = [name for name in above.children() if pattern.fullmatch(name)]
        folders = [n for n in found if (above.path / n).is_dir() and not above.is_link(n)]
        return tuple(above.child(name) for name in folders)

    def delete_all(self, head: str, head_copy: str, first_prefix: str) -> None:
        rest = self.path
        if not re.fullmatch(_REST.format(".+"), rest.name):
            rest = rest.with_name(f".{rest.name}.{uuid.uuid4().hex}.removed")
            self.path.rename(rest)
            sync_folders(rest.parent, rest.parent)
        (rest / head).unlink(missing_ok=True)
        shutil.rmtree(rest)

    def checked_path(self, name: str) -> Path:
        """Path of an object; the folder itself may be reached by links: that is the user's choice.

        Raises DamagedStoreError where a step below is a link, or what is there is no plain file.
        """
        self.size(name)
        return self.path / name

    def _look(self, name: str) -> os.stat_result | None:
        """What is there by this name, having made sure that no step to it is a link."""
        steps = name.split("/") if name else []
        assert not {"", ".", ".."} & set(steps), name
        place, found = str(self.path), None  # as text: pathlib takes longer than the system
        for step in steps:
            place = f"{place}/{step}"
            try:
                found = os.lstat(place)
            except (FileNotFoundError, NotADirectoryError):
                return None
            if stat.S_ISLNK(found.st_mode):
                raise DamagedStoreError(f"{place} is a symbolic link, which a store must not have")
        return found


def _fill(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    """Fill buffers, however little the system gives at a time; gives the next offset."""
    missing = sum(map(len, buffers))
    while missing:
        count = os.preadv(descriptor, buffers, offset)
        if not count:
            raise ValueError(f"it ends before byte {offset + missing}")
        offset, missing = offset + count, missing - count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]
    return offset


def _calls(buffers: Sequence[np.ndarray]) -> Iterator[list[memoryview]]:
    """The memory of buffers, as much at a time as the system fills in one call."""
    whole = [one.reshape(-1).view(np.uint8).data for one in buffers]
    some: list[memoryview] = []
    size = 0
    for piece in (one[at : at + _CALL] for one in whole for at in range(0, len(one), _CALL)):
        if len(some) == _CALL_BUFFERS or size + len(piece) > _CALL:
            yield some
            some, size = [], 0
        some.append(piece)
        size += len(piece)
    yield some


def _create_link(source: Path, path: Path) -> bool:
    """Give a synced file a second name that must not exist yet; False if it does."""
    try:
        os.link(source, path)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        # a server whose answer was lost is asked again, and then finds the link it has just made
        if not path.exists() or not path.samefile(source):
            return False
    _sync_folder(path.parent)
    return True


def _write_temporary(path: Path, pieces: Iterable[bytes]) -> Path:
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
            error.filename = str(path)  # a full disk does not say where
        raise
    return temporary


def _forget(file: BinaryIO) -> None:
    """Let the system's cache drop what was read back of a file that was just written.

    Its pages are used again for what is written next: fresh ones cost several times what filling
    them does, and others' data would have to go for them.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)


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
    share_with_group(folder)


def share_with_group(path: Path) -> None:
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


def _files_below(top: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders, in a stable order; none if there is no folder.

    A link to a folder counts as a file: what it leads to is not looked at.
    """
    for folder, subfolders, names in os.walk(top):
        links = {name for name in subfolders if os.path.islink(os.path.join(folder, name))}
        subfolders[:] = sorted(set(subfolders) - links)
        for name in sorted([*names, *links]):
            yield Path(folder, name)
