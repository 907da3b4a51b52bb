"""A folder on this machine that keeps what was read of a store, so that it crosses a network once.

    TIER/<store>/<object>/<offset>-<length>     bytes of an object, as they were read
    TIER/length                                 a file without content, as long as all that is kept

`<store>` stands for where a store lies and for its `store.json`, `<object>` for the digest in the
object's mark: what is mended or made anew has another name, so nothing here goes stale. Marks and
metadata are never kept.

Bytes are kept once their checksums were compared, and compared again at every reading: what is
torn or damaged here is read from the store, and replaced. Nothing is driven out: each epoch reads
every row once, so that what was read last is no likelier to be read next.

Processes may share the folder, several stores too. It may be deleted at any time, whole.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import shutil
import stat
import threading
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mpcache.storage.base import Storage
from mpcache.storage.cloud import is_url
from mpcache.storage.local import LocalStorage, make_folders, open_to_group
from mpcache.storage.tempfiles import is_temporary, temporary_name
from mpcache.store.zarr_codec import ReadInto
from mpcache.validation import user_path

_SPARED = 20  # a part in so many of the file system stays free: runs save their states somewhere
_LENGTH = "length"

Made = TypeVar("Made")


class ReadCache:
    """What is kept of one store. Threads may share it.

    A tier that has no room, or cannot be written, is no error: a warning says so once, and what it
    lacks is read from the store.
    """

    def __init__(self, folder: str, most: int | None, place: Storage, digest: str) -> None:
        """`digest` is that of the place's `store.json`; `most` bytes are kept, of all stores.

        Raises:
            ValueError: the folder is no nearer than the store.
            OSError: there can be no such folder. Nothing is written yet.
        """
        if not folder or is_url(folder):
            raise ValueError(f"a tier must be a folder of this machine, got {folder!r}; name one")
        self.folder = LocalStorage(user_path(folder).absolute())
        self.most = most
        self._store = hashlib.sha256(f"{place.address}\n{digest}".encode()).hexdigest()[:32]
        self._ending, self._has_ended = threading.Lock(), False
        _refuse(self.folder.path, place)

    def made(self, key: str, read: ReadInto, make: Callable[[ReadInto], Made]) -> Made:
        """What `make` makes of an object's bytes: of those kept here, else of those `read` gives.

        `key` is the object's digest. `make` raises ValueError or RuntimeError where bytes are not
        what was committed.
        """
        name = f"{self._store}/{key}"
        try:
            return make(functools.partial(self._kept, name))
        except (OSError, ValueError, RuntimeError):
            if self._has_ended:
                return make(read)
        # it is not here, or not whole
        fresh: list[tuple[int, np.ndarray]] = []

        def reading(offset: int, buffers: Sequence[np.ndarray]) -> None:
            read(offset, buffers)
            fresh.append((offset, np.concatenate([b.reshape(-1).view(np.uint8) for b in buffers])))

        made = make(reading)
        for offset, data in fresh:
            self._keep(f"{name}/{offset}-{len(data)}", data)
        return made

    def size(self, key: str) -> int:
        """Bytes that are kept of an object."""
        folder = self.folder.child(f"{self._store}/{key}")
        return sum(folder.size(name) or 0 for name in folder.children() if not is_temporary(name))

    def _kept(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        length = sum(one.nbytes for one in buffers)
        self.folder.read_into(f"{name}/{offset}-{length}", 0, buffers)

    def _keep(self, name: str, data: np.ndarray) -> None:
        try:
            told = self._put(name, data)
        except OSError as error:
            told = error.strerror or str(error)
        if told:
            self._end(told)

    def _put(self, name: str, data: np.ndarray) -> str:
        """Keep bytes, all or nothing; else say why there is no room for them."""
        path = self.folder.locate(name)
        self._make()
        make_folders(path.parent)
        disk = shutil.disk_usage(path.parent)
        if disk.free - len(data) < disk.total // _SPARED:
            return f"its file system has {disk.free / 1e9:.3g} GB left"
        temporary = path.with_name(temporary_name(path.name, uuid.uuid4().hex))
        try:
            # not synced: what a power cut leaves of it does not pass for what it was
            with temporary.open("xb") as file:
                open_to_group(temporary)
                file.write(data.data)
            return self._publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make(self) -> None:
        """Make the folder; where anyone may write, as in /dev/shm, it is its owner's alone."""
        folder = self.folder.path
        if folder.is_dir():
            return
        make_folders(folder.parent)
        if folder.parent.stat().st_mode & stat.S_IWOTH:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(0o700)

    def _publish(self, temporary: Path, path: Path) -> str:
        """Give a file its name, and count it if it is new, one process and thread at a time."""
        counter, size = self.folder.locate(_LENGTH), temporary.stat().st_size
        with open(os.open(counter, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            open_to_group(counter)
            if not path.exists():
                kept = os.fstat(file.fileno()).st_size
                if self.most is not None and kept + size > self.most:
                    return f"{kept} of {self.most} bytes are taken"
                file.truncate(kept + size)
            temporary.replace(path)
        return ""

    def _end(self, told: str) -> None:
        with self._ending:
            is_first, self._has_ended = not self._has_ended, True
        if is_first:
            warnings.warn(
                f"the tier in {self.folder} keeps no more ({told}); what it lacks is read from the "
                "store each time",
                RuntimeWarning,
                stacklevel=2,
            )


def _refuse(folder: Path, place: Storage) -> None:
    here = next(path for path in (folder, *folder.parents) if path.exists())
    if not here.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(here))
    if here != folder and not os.access(here, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if isinstance(place, LocalStorage) and place.path.stat().st_dev == here.stat().st_dev:
        raise ValueError(
            f"a tier must be nearer than its store, got {folder} on the file system of {place}; "
            "leave it out, or name a folder of a faster disk or of memory, such as /dev/shm/tier"
        )
