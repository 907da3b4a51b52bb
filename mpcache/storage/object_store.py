"""A prefix of a bucket as storage: objects whole or not at all, copied by the server.

There are no folders, links or renames. A new object is uploaded under a temporary name and then
copied to its own name by the server, which also decides which process creates an object that must
be new. Amazon's, Google's and compatible servers show every write to all later requests.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mpcache.storage.bucket_requests import Bucket, request_threads
from mpcache.storage.cloud_connection import split_url
from mpcache.storage.temporary_names import temporary_name


class ObjectStorage:
    """A prefix of a bucket; mpcache.storage.base has the contract."""

    concurrency = 8
    max_object_bytes: int | None = 5_000_000_000  # bytes that a server copies in one request

    def __init__(self, url: str) -> None:
        scheme, bucket, self.prefix = split_url(url)
        self.bucket = Bucket(scheme, bucket)

    def __str__(self) -> str:
        return f"{self.bucket}/{self.prefix}".removesuffix("/")

    @property
    def name(self) -> str:
        return self.prefix.rpartition("/")[2] or self.bucket.name

    @property
    def address(self) -> str:
        return str(self)

    def child(self, name: str) -> "ObjectStorage":
        return ObjectStorage(f"{self}/{name}")

    def children(self) -> list[str]:
        import obstore

        listing = self.bucket.request(obstore.list_with_delimiter, self.prefix or None)
        keys = [*listing["common_prefixes"], *(item["path"] for item in listing["objects"])]
        return sorted({name for key in keys if (name := self._name(key))})

    def is_within(self, other: object) -> bool:
        return isinstance(other, ObjectStorage) and f"{self}/".startswith(f"{other}/")

    # --- looking ---

    def exists(self, name: str = "") -> bool:
        if name:
            return self.size(name) is not None
        return next(self.object_names(), None) is not None

    def is_link(self, name: str = "") -> bool:
        return False

    def can_be_root(self) -> bool:
        return True

    def size(self, name: str) -> int | None:
        return self.bucket.size(self._key(name))

    def object_names(self, prefix: str = "") -> Iterator[str]:
        below = self._key(prefix) if prefix else self.prefix or None
        # the folder of a web console may be an object without a name
        return (name for key in self.bucket.keys(below) if (name := self._name(key)))

    # --- reading ---

    def read(self, name: str) -> bytes:
        return self.bucket.read(self._key(name))

    def read_pieces(self, name: str) -> Iterator[bytes]:
        return self.bucket.read_pieces(self._key(name))

    def read_into(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        length = sum(buffer.nbytes for buffer in buffers)
        data = self.bucket.read_range(self._key(name), offset, length)
        for buffer in buffers:
            buffer.reshape(-1).view(np.uint8)[:] = data[: buffer.nbytes]
            data = data[buffer.nbytes :]

    # --- writing ---

    def create(self, name: str, data: bytes) -> bool:
        return self.bucket.create(self._key(name), data, self.prefix)

    def replace(self, name: str, data: bytes) -> None:
        import obstore

        self.bucket.request(obstore.put, self._key(name), data)

    def write_temporary(self, name: str, key: str, pieces: Iterable[bytes]) -> str:
        temporary = temporary_name(name, key)
        self.bucket.upload(self._key(temporary), pieces)
        return temporary

    def publish(self, temporary: str, name: str) -> bool:
        import obstore

        try:
            self.bucket.request(obstore.copy, self._key(temporary), self._key(name))
        except FileNotFoundError:
            return False
        return True

    def create_copy(self, source: str, name: str) -> bool:
        return self.create(name, self.read(source))

    def delete(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self.bucket.request(obstore.delete, self._key(name))

    def sync(self, name: str, top: str = "") -> None:
        """Nothing to do: servers answer once they will not lose the data."""

    # --- removal ---

    def removal_leftovers(self) -> "tuple[ObjectStorage, ...]":
        return ()

    def delete_all(self, head: str, head_copy: str, first_prefix: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.replace(head_copy, self.read(head))
        self.delete(head)
        for prefix in (first_prefix, ""):
            names = [name for name in self.object_names(prefix) if name != head_copy]
            for _ in request_threads().map(self.delete, names):
                pass
        self.delete(head_copy)

    # --- keys ---

    def _key(self, name: str) -> str:
        assert not {"", ".", ".."} & set(name.split("/")), name
        return f"{self.prefix}/{name}" if self.prefix else name

    def _name(self, key: str) -> str:
        return f"{key}/".removeprefix(f"{self.prefix}/" if self.prefix else "").removesuffix("/")
