"""Where a store, or a root of stores, lies: a folder or a bucket, behind one contract.

Modules above do not know which. Object names are those of the store format: relative, steps joined
by `/`.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mpcache.errors import UsageError
from mpcache.storage.cloud_connection import is_url
from mpcache.storage.local import LocalStorage
from mpcache.storage.object_store import ObjectStorage


@runtime_checkable
class Storage(Protocol):
    """A folder, or a prefix of a bucket. Threads may share it; `str` of it opens it again.

    Every method raises DamagedStoreError rather than follow a link out of the storage, and
    ConnectionError where a server does not answer.
    """

    concurrency: int
    "calls worth making at a time, each from a thread of its own that waits for a server"
    max_object_bytes: int | None
    "bytes of the largest object that can be published; None where there is no limit"

    @property
    def name(self) -> str:
        """The last step of its real path."""
        ...

    @property
    def address(self) -> str:
        """Text that opens it from any working directory and any machine that shares it."""
        ...

    def child(self, name: str) -> "Storage":
        """The storage of this name directly below; UsageError for an impossible name."""
        ...

    def children(self) -> list[str]:
        """Names of all objects and folders directly below, in a stable order."""
        ...

    def is_within(self, other: "Storage") -> bool:
        """Whether this is the other storage, or lies in it."""
        ...

    # --- looking ---

    def exists(self, name: str = "") -> bool:
        """Whether an object, folder or link has this name; without a name, the storage itself."""
        ...

    def is_link(self, name: str = "") -> bool:
        """Whether a name is a link, which no method follows."""
        ...

    def can_be_root(self) -> bool:
        """Whether this is, or can become, a folder that holds stores; a file cannot."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if it is not there."""
        ...

    def object_names(self, prefix: str = "") -> Iterator[str]:
        """All objects below, in a stable order. A link counts as an object."""
        ...

    # --- reading ---

    def read(self, name: str) -> bytes:
        """The bytes of a small object; FileNotFoundError if it is not there."""
        ...

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of an object in pieces of a few megabytes; FileNotFoundError as `read`.

        Used to read back temporary objects, which then leave the system's page cache.
        """
        ...

    def read_into(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """Fill buffers, one after the other, with an object's bytes from an offset on.

        Raises FileNotFoundError if the object is not there, ValueError if it ends before.
        """
        ...

    # --- writing; it outlives a power cut once `sync` was called ---

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that must not exist yet, all or nothing; False if it exists."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write an object over what is there, all or nothing."""
        ...

    def write_temporary(self, name: str, key: str, pieces: Iterable[bytes]) -> str:
        """Write what is to become an object; returns its temporary name, which depends on `key`.

        Pieces of a megabyte or so are best: on ext4, syncing a file that came in one large write
        took ten times the processor time. A bucket holds all pieces in memory until they are sent.
        """
        ...

    def publish(self, temporary: str, name: str) -> bool:
        """Give a temporary object its name, over what is there; False if it is not there.

        The temporary object may remain: the caller deletes it when nobody needs it any more.
        """
        ...

    def create_copy(self, source: str, name: str) -> bool:
        """Give a small object a second name; False if something else may have that name.

        Raises FileNotFoundError where the source is gone.
        """
        ...

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        ...

    def sync(self, name: str, top: str = "") -> None:
        """Make the names of an object and of its folders below `top` outlive a power cut."""
        ...

    # --- removal ---

    def removal_leftovers(self) -> "tuple[Storage, ...]":
        """What interrupted removals of this storage have left beside it."""
        ...

    def delete_all(self, head: str, head_copy: str, first_prefix: str) -> None:
        """Delete everything for good, the object `head` first: without it there is no store.

        A storage that cannot be moved away as a whole keeps the content of `head` as `head_copy`
        until all else is gone, and deletes what is below `first_prefix` before the rest.
        Links are deleted, and not followed.
        """
        ...


def open_storage(where: str | Path | Storage) -> Storage:
    """The storage at a path or an `s3://` or `gs://` URL; UsageError for another URL."""
    if isinstance(where, str):
        return ObjectStorage(where) if is_url(where) else LocalStorage(Path(where))
    if not isinstance(where, Path):
        return where
    if where.parts[:1] in (("s3:",), ("gs:",)):
        raise UsageError("a Path cannot hold a URL; give the URL as a str")
    return LocalStorage(where)
