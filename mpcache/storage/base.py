"""Where a store, or a root of stores, lies: a folder or a bucket, behind one contract.

No module above knows which. Names are those of the store format: relative, steps joined by `/`.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mpcache.storage.cloud import is_url
from mpcache.storage.local import LocalStorage
from mpcache.storage.object_store import ObjectStorage


@runtime_checkable
class Storage(Protocol):
    """A folder or a bucket's prefix. Threads may share it; its text leads to it again.

    Every method raises DamagedStoreError rather than follow a link out of the place, and
    ConnectionError where a server does not answer.
    """

    concurrency: int
    "calls that are worth making at a time, each from a thread: where they wait for a server"
    max_object_bytes: int | None
    "bytes of the largest object that can be published; None where there is no limit"

    @property
    def name(self) -> str:
        """The last step of where it really is."""
        ...

    @property
    def address(self) -> str:
        """Text that leads here from any working directory and any machine that shares the place."""
        ...

    def child(self, name: str) -> "Storage":
        """The place of this name directly below; ValueError where a place cannot have it."""
        ...

    def children(self) -> list[str]:
        """Names of all that is directly below, in a stable order; none where nothing is."""
        ...

    def is_within(self, other: "Storage") -> bool:
        """Whether this is the other place, or lies in it."""
        ...

    # --- looking ---

    def exists(self, name: str = "") -> bool:
        """Whether anything has this name, be it a link; without a name, whether the place is."""
        ...

    def is_link(self, name: str = "") -> bool:
        """Whether a name is a link, which nothing here follows."""
        ...

    def can_be_root(self) -> bool:
        """Whether this can be a root: a folder, and not a file."""
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
        """The bytes of an object, a megabyte or so at a time; FileNotFoundError as `read`.

        What was prepared is read back so, and does not stay in the system's cache then.
        """
        ...

    def read_into(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        """Fill buffers, one after the other, with an object's bytes from an offset on.

        Raises FileNotFoundError if it is not there, ValueError if it ends before.
        """
        ...

    # --- writing; what a call has done outlives a power cut once `sync` was called ---

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that must not exist yet, all or nothing; False if another's is there."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write an object over what is there, all or nothing."""
        ...

    def write_temporary(self, name: str, key: str, pieces: Iterable[bytes]) -> str:
        """Write what is to become an object; gives its temporary name, which depends on `key`.

        Pieces of a megabyte or so are best: on ext4, syncing a file that came in one large write
        took ten times the processor time. A bucket holds them all in memory until they are sent.
        """
        ...

    def publish(self, temporary: str, name: str) -> bool:
        """Give a prepared object its name, over what is there; False if it is not there.

        The temporary object may remain: who calls deletes it when nobody needs it any more.
        """
        ...

    def create_copy(self, source: str, name: str) -> bool:
        """Give a small object a second name; False if something else may have it already.

        Raises FileNotFoundError where the source is gone.
        """
        ...

    def delete(self, name: str) -> None:
        """Delete an object, if it is there."""
        ...

    def sync(self, name: str, top: str = "") -> None:
        """Let an object's being there, in the folders between it and `top`, outlive a power cut."""
        ...

    # --- leaving ---

    def removal_leftovers(self) -> "tuple[Storage, ...]":
        """What interrupted removals of this place have left beside it."""
        ...

    def delete_all(self, head: str, head_copy: str, first_prefix: str) -> None:
        """Delete everything for good. First `head` goes: then there is no store any more.

        Until all is gone, `told` has the content of `head`, where the rest does not move away; then
        all below `first` goes before anything else.
        Links are deleted, what they lead to is not.
        """
        ...


def open_storage(where: str | Path | Storage) -> Storage:
    """The place that a path or a URL leads to.

    Raises ValueError where a URL is none of a bucket.
    """
    if isinstance(where, str):
        return ObjectStorage(where) if is_url(where) else LocalStorage(Path(where))
    if not isinstance(where, Path):
        return where
    if where.parts[:1] in (("s3:",), ("gs:",)):
        raise ValueError("a Path cannot hold a URL; give the URL as text")
    return LocalStorage(where)
