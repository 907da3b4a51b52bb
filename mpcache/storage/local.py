"""A folder of a local or shared file system as storage.

Zarr's LocalStore renames atomically but does not sync, so a power cut can leave a renamed but empty
file. Here every object is synced, with its folders, before a mark names it. No path is used before
it is certain that no link in the folder leads out of it.
"""

import contextlib
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
from mpcache.storage import atomic_files
from mpcache.storage.temporary_names import is_temporary, temporary_name
from mpcache.untrusted_names import user_path

# Linux fills no more at a time: bytes (2 GiB), buffers (IOV_MAX)
_CALL, _CALL_BUFFERS = 1 << 30, 1024
_PIECE_BYTES = 1 << 20
_REMOVED = r"\.{}\.[0-9a-f]{{32}}\.removed"


class LocalStorage:
    """A folder; mpcache.storage.base has the contract."""

    concurrency = 1
    max_object_bytes: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        # of the instance, so that it goes with the storage; checking each step takes long
        self._checked_once = functools.lru_cache(maxsize=4096)(self.checked_path)

    def __str__(self) -> str:
        return str(self.path)

    def __reduce__(self) -> "tuple[type[LocalStorage], tuple[Path]]":
        return LocalStorage, (Path(self.address),)  # working folders differ

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
        status = _status(self.path, name)
        if status is None:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise DamagedStoreError(
                f"{self.path / name} must be a regular file, got a folder or a special file; "
                "move it out of the store"
            )
        return status.st_size

    def object_names(self, prefix: str = "") -> Iterator[str]:
        _status(self.path, prefix)
        for file in _files_below(self.path / prefix):
            yield file.relative_to(self.path).as_posix()

    def read(self, name: str) -> bytes:
        return self.checked_path(name).read_bytes()

    def read_pieces(self, name: str) -> Iterator[bytes]:
        with self.checked_path(name).open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
                if is_temporary(name):
                    _forget(file)

    def read_into(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        descriptor = os.open(self._checked_once(name), os.O_RDONLY)
        try:
            for batch in _batches(buffers):
                offset = _fill(descriptor, batch, offset)
        finally:
            os.close(descriptor)

    def create(self, name: str, data: bytes) -> bool:
        path = self.checked_path(name)
        if path.exists():  # saves a write, and works on read-only media; the link decides
            return False
        atomic_files.make_folders(path.parent)
        temporary = atomic_files.write_temporary_file(path, [data])
        try:
            return atomic_files.create_link(temporary, path)
        finally:
            temporary.unlink()

    def replace(self, name: str, data: bytes) -> None:
        atomic_files.replace_file(self.checked_path(name), data)

    def write_temporary(self, name: str, key: str, pieces: Iterable[bytes]) -> str:
        path, temporary = self.checked_path(name), temporary_name(name, key)
        atomic_files.make_folders(path.parent)
        # another process that copies the same may be writing under the same key
        atomic_files.write_temporary_file(path, pieces).replace(self.checked_path(temporary))
        return temporary

    def publish(self, temporary: str, name: str) -> bool:
        path = self.checked_path(name)
        atomic_files.make_folders(path.parent)
        try:
            self.checked_path(temporary).replace(path)
        except FileNotFoundError:
            return False
        return True

    def create_copy(self, source: str, name: str) -> bool:
        path = self.checked_path(name)
        atomic_files.make_folders(path.parent)
        return atomic_files.create_link(self.checked_path(source), path)

    def delete(self, name: str) -> None:
        self.checked_path(name).unlink(missing_ok=True)

    def sync(self, name: str, top: str = "") -> None:
        folder = (self.path / name).parent
        if folder.is_dir():
            atomic_files.sync_folders(folder, self.path / top)

    def removal_leftovers(self) -> "tuple[LocalStorage, ...]":
        pattern = re.compile(_REMOVED.format(re.escape(self.path.name)))
        above = LocalStorage(self.path.parent)
        names = [name for name in above.children() if pattern.fullmatch(name)]
        folders = [n for n in names if (above.path / n).is_dir() and not above.is_link(n)]
        return tuple(above.child(name) for name in folders)

    def delete_all(self, head: str, head_copy: str, first_prefix: str) -> None:
        removed = self.path
        if not re.fullmatch(_REMOVED.format(".+"), removed.name):
            removed = removed.with_name(f".{removed.name}.{uuid.uuid4().hex}.removed")
            self.path.rename(removed)
            atomic_files.sync_folder(removed.parent)
        (removed / head).unlink(missing_ok=True)
        shutil.rmtree(removed)

    def checked_path(self, name: str) -> Path:
        """Path of an object; the folder itself may be reached by links: that is the user's choice.

        Raises DamagedStoreError where a step below is a link, or what is there is no plain file.
        """
        self.size(name)
        return self.path / name


def _status(top: Path, name: str) -> os.stat_result | None:
    """Status of an object or folder, None if it is not there; no step to it is a link."""
    steps = name.split("/") if name else []
    assert not {"", ".", ".."} & set(steps), name
    path, status = str(top), None  # as text: pathlib takes longer than the system call
    for step in steps:
        path = f"{path}/{step}"
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISLNK(status.st_mode):
            raise DamagedStoreError(
                f"{path} is a symbolic link, which a store must not contain; replace the link by "
                "the file or folder itself"
            )
    return status


def _fill(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    """Fill buffers, however few bytes a call reads; returns the next offset."""
    missing = sum(map(len, buffers))
    while missing:
        count = os.preadv(descriptor, buffers, offset)
        if not count:
            raise ValueError(f"the file ends before byte {offset + missing}")
        offset, missing = offset + count, missing - count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]
    return offset


def _batches(buffers: Sequence[np.ndarray]) -> Iterator[list[memoryview]]:
    """The memory of buffers, in batches that the system fills in one call."""
    whole = [buffer.reshape(-1).view(np.uint8).data for buffer in buffers]
    batch: list[memoryview] = []
    size = 0
    for piece in (m[at : at + _CALL] for m in whole for at in range(0, len(m), _CALL)):
        if len(batch) == _CALL_BUFFERS or size + len(piece) > _CALL:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece)
    yield batch


def _forget(file: BinaryIO) -> None:
    """Let the page cache drop what was read back of a file that was just written.

    The next write uses these pages again. Fresh pages cost several times what filling them does,
    and would displace other data.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)


def _files_below(top: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders, in a stable order; none if there is no folder.

    A link to a folder counts as a file and is not followed.
    """
    for folder, subfolders, names in os.walk(top):
        links = {name for name in subfolders if os.path.islink(os.path.join(folder, name))}
        subfolders[:] = sorted(set(subfolders) - links)
        for name in sorted([*names, *links]):
            yield Path(folder, name)
