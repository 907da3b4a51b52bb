"""A local folder that keeps the bytes read from a distant store, so that they cross a network once.

    CACHE/<store>/<object>/<offset>-<length>     bytes of an object, as they were read
    CACHE/length                                 an empty (sparse) file, as long as all cached bytes

`<store>` stands for the store's address and its `store.json`, `<object>` for the digest in the
object's mark. A repaired object has another digest, so cached bytes are never stale. Marks and
metadata are never cached.

Bytes are cached once their checksums were compared, and are compared again at every read. Torn or
damaged cache files are read from the store again and replaced. Nothing is evicted: each epoch reads
every row once, so a recently read row is no likelier to be read next.

Processes may share the folder, and so may several stores. It may be deleted at any time, whole.
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

from mpcache.errors import UsageError
from mpcache.storage.atomic_files import make_folders, share_with_group
from mpcache.storage.base import Storage
from mpcache.storage.cloud_connection import is_url
from mpcache.storage.local import LocalStorage
from mpcache.storage.temporary_names import is_temporary, temporary_name
from mpcache.store.zarr_codec import ReadInto
from mpcache.untrusted_names import user_path

_RESERVED = 20  # one part in this many of the file system stays free, for instance for checkpoints
_COUNTER = "length"

Decoded = TypeVar("Decoded")


class ReadCache:
    """The cached bytes of one store. Threads may share it.

    A cache that is full or not writable is no error: one warning says so, and bytes that the cache
    lacks come from the store.
    """

    def __init__(
        self, folder: str, max_bytes: int | None, storage: Storage, store_digest: str
    ) -> None:
        """`store_digest` is that of `store.json`; `max_bytes` bounds the files of all stores.

        Raises:
            UsageError: the folder is no local folder, or is on the store's own file system.
            OSError: the folder cannot be made. Nothing is written yet.
        """
        if not folder or is_url(folder):
            raise UsageError(
                f"the cache directory must be a local folder, got {folder!r}; give the path of a "
                "local folder"
            )
        self.folder = LocalStorage(user_path(folder).absolute())
        self.max_bytes = max_bytes
        self._store = hashlib.sha256(f"{storage.address}\n{store_digest}".encode()).hexdigest()[:32]
        self._lock, self._is_full = threading.Lock(), False
        _check_folder(self.folder.path, storage)

    def read_through(
        self, key: str, fetch: ReadInto, decode: Callable[[ReadInto], Decoded]
    ) -> Decoded:
        """What `decode` makes of an object's bytes: cached bytes, else those that `fetch` reads.

        `key` is the object's digest. `decode` raises ValueError or RuntimeError where the bytes are
        not those that were committed.
        """
        name = f"{self._store}/{key}"
        try:
            return decode(functools.partial(self._read_cached, name))
        except (OSError, ValueError, RuntimeError):  # not cached, or not whole
            if self._is_full:
                return decode(fetch)
        fetched: list[tuple[int, np.ndarray]] = []

        def fetch_and_keep(offset: int, buffers: Sequence[np.ndarray]) -> None:
            fetch(offset, buffers)
            data = np.concatenate([b.reshape(-1).view(np.uint8) for b in buffers])
            fetched.append((offset, data))

        decoded = decode(fetch_and_keep)
        for offset, data in fetched:
            self._add(f"{name}/{offset}-{len(data)}", data)
        return decoded

    def size(self, key: str) -> int:
        """Cached bytes of an object."""
        folder = self.folder.child(f"{self._store}/{key}")
        return sum(folder.size(name) or 0 for name in folder.children() if not is_temporary(name))

    def _read_cached(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        length = sum(buffer.nbytes for buffer in buffers)
        self.folder.read_into(f"{name}/{offset}-{length}", 0, buffers)

    def _add(self, name: str, data: np.ndarray) -> None:
        try:
            reason = self._write(name, data)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason:
            self._stop_adding(reason)

    def _write(self, name: str, data: np.ndarray) -> str:
        """Cache bytes, all or nothing; otherwise give the reason why there is no room."""
        path = self.folder.checked_path(name)
        self._make_folder()
        make_folders(path.parent)
        disk = shutil.disk_usage(path.parent)
        if disk.free - len(data) < disk.total // _RESERVED:
            return f"its file system has {disk.free / 1e9:.3g} GB left"
        temporary = path.with_name(temporary_name(path.name, uuid.uuid4().hex))
        try:
            # not synced: its checksums tell what a power cut has torn
            with temporary.open("xb") as file:
                share_with_group(temporary)
                file.write(data.data)
            return self._publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_folder(self) -> None:
        """Make the folder; where anyone may write, as in /dev/shm, it is its owner's alone."""
        folder = self.folder.path
        if folder.is_dir():
            return
        make_folders(folder.parent)
        if folder.parent.stat().st_mode & stat.S_IWOTH:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(0o700)

    def _publish(self, temporary: Path, path: Path) -> str:
        """Rename a file, and count its bytes if it is new; one process and thread at a time."""
        counter, size = self.folder.checked_path(_COUNTER), temporary.stat().st_size
        with open(os.open(counter, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            share_with_group(counter)
            if not path.exists():
                used = os.fstat(file.fileno()).st_size
                if self.max_bytes is not None and used + size > self.max_bytes:
                    return f"{used} of {self.max_bytes} bytes are used"
                file.truncate(used + size)
            temporary.replace(path)
        return ""

    def _stop_adding(self, reason: str) -> None:
        with self._lock:
            is_first, self._is_full = not self._is_full, True
        if is_first:
            warnings.warn(
                f"the read cache {self.folder} stores no more data ({reason}); data that is "
                "not in the cache is read from the store each time",
                RuntimeWarning,
                stacklevel=2,
            )


def _check_folder(folder: Path, storage: Storage) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
    if existing != folder and not os.access(existing, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    if isinstance(storage, LocalStorage) and (storage.path.stat().st_dev == existing.stat().st_dev):
        raise UsageError(
            f"the cache directory {folder} is on the same file system as the store, so a cache "
            "there saves no time; remove --cache-dir, or give a folder on a faster disk or in "
            "memory, such as /dev/shm/cache"
        )
