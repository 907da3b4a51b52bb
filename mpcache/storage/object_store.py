"""A store in a bucket of an object store: objects whole or not at all, copied by the server.

There are no folders, links or renames. A new object is uploaded under a temporary name and then
copied to its own name by the server, which also decides which process creates an object that must
be new. Amazon's, Google's and compatible servers show every write to all later requests.

Memory: an object is held whole while it is uploaded, because its server may lose it halfway.
Reading holds eight pieces of 8 MiB of each object.
"""

import contextlib
import itertools
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from mpcache.errors import UsageError
from mpcache.storage.cloud import Scheme, bucket_client, split_url, translate_errors
from mpcache.storage.tempfiles import temporary_name

_PART = 8 << 20  # bytes of a request; servers want at least 5 MiB in all parts but the last
_CONCURRENCY = 8  # simultaneous requests for one object, up or down
_PAGE = 1000  # names in one answer; servers give no more
_TRIES = 5  # for requests that fail at once
_SOON = 1.0  # seconds; obstore has tried more than once where it gives up later than this
_PATIENCE = 120.0  # seconds that a server may be away before the command ends
_PAUSE = 0.2  # seconds before the second try, doubled for each later one
_LONGEST_PAUSE = 10.0

Answer = TypeVar("Answer")


class ObjectStorage:
    """A prefix of a bucket; mpcache.storage.base has the contract."""

    concurrency = 8
    max_object_bytes: int | None = 5_000_000_000  # bytes that a server copies in one request

    def __init__(self, url: str) -> None:
        self.scheme, self.bucket, self.prefix = split_url(url)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".removesuffix("/")

    @property
    def name(self) -> str:
        return self.prefix.rpartition("/")[2] or self.bucket

    @property
    def address(self) -> str:
        return str(self)

    def child(self, name: str) -> "ObjectStorage":
        return ObjectStorage(f"{self}/{name}")

    def children(self) -> list[str]:
        import obstore

        listing = self._ask(obstore.list_with_delimiter, self.prefix or None)
        paths = [*listing["common_prefixes"], *(item["path"] for item in listing["objects"])]
        return sorted({name for path in paths if (name := self._name(path))})

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
        import obstore

        try:
            return int(self._ask(obstore.head, self._key(name))["size"])
        except FileNotFoundError:
            _check_bucket(self.scheme, self.bucket)  # a missing bucket gives the same answer
            return None

    def object_names(self, prefix: str = "") -> Iterator[str]:
        below, last = self._key(prefix) if prefix else self.prefix or None, None
        while page := self._ask(_page, below, last):
            for key in page:
                if name := self._name(key):  # a console's folder may be an object too
                    yield name
            if len(page) < _PAGE:
                return
            last = page[-1]

    # --- reading ---

    def read(self, name: str) -> bytes:
        import obstore

        def whole(bucket: Any, key: str) -> bytes:
            return obstore.get(bucket, key).bytes().to_bytes()

        return self._ask(whole, self._key(name))

    def read_pieces(self, name: str) -> Iterator[bytes]:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self}/{name}")
        waiting: deque[Future[np.ndarray]] = deque()
        for offset in range(0, size, _PART):
            if len(waiting) == _CONCURRENCY:
                yield waiting.popleft().result().tobytes()
            length = min(_PART, size - offset)
            waiting.append(_requests().submit(self._range, name, offset, length))
        while waiting:
            yield waiting.popleft().result().tobytes()

    def read_into(self, name: str, offset: int, buffers: Sequence[np.ndarray]) -> None:
        data = self._range(name, offset, sum(buffer.nbytes for buffer in buffers))
        for buffer in buffers:
            buffer.reshape(-1).view(np.uint8)[:] = data[: buffer.nbytes]
            data = data[buffer.nbytes :]

    def _range(self, name: str, offset: int, length: int) -> np.ndarray:
        import obstore

        try:
            answer = self._ask(obstore.get_range, self._key(name), start=offset, length=length)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if offset < (self.size(name) or 0):
                raise
            answer = obstore.Bytes()
        data = np.frombuffer(memoryview(answer), np.uint8)
        if len(data) != length:
            raise ValueError(f"it ends before byte {offset + length}")
        return data

    # --- writing ---

    def create(self, name: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        if self.size(name) is not None:  # saves a write, and works where writing is forbidden
            return False
        _check_create_only(self.scheme, self.bucket, self.prefix)
        for pause in itertools.islice(_pauses(), _TRIES):
            try:
                self._ask(obstore.put, self._key(name), data, mode="create")
            except (AlreadyExistsError, PreconditionError):
                # a retry after a lost answer finds our own object; a process that loses to another
                # one that is not done yet finds nothing
                with contextlib.suppress(FileNotFoundError):
                    return self.read(name) == data
                time.sleep(pause)
            else:
                return True
        raise ConnectionError(f"{self}/{name} can be neither created nor read")

    def replace(self, name: str, data: bytes) -> None:
        import obstore

        self._ask(obstore.put, self._key(name), data)

    def write_temporary(self, name: str, key: str, pieces: Iterable[bytes]) -> str:
        import obstore

        temporary, rest = temporary_name(name, key), iter(pieces)
        kept, failed = list(_first(rest, _PART)), list[BaseException]()
        if sum(map(len, kept)) < _PART:
            self.replace(temporary, b"".join(kept))
            return temporary

        def put(bucket: Any, path: str) -> None:
            try:
                # several parts on their way at a time
                obstore.put(
                    bucket, path, itertools.chain(kept.copy(), _keeping(rest, kept, failed)),
                    use_multipart=True, chunk_size=_PART, max_concurrency=_CONCURRENCY,
                )  # fmt: skip
            except FileNotFoundError:
                # done, but the answer was lost: the retry finds no upload any more
                if not failed and obstore.head(bucket, path)["size"] != sum(map(len, kept)):
                    raise
            except Exception:
                if not failed:  # else the source failed, not this server: no retry
                    raise

        self._ask(put, self._key(temporary))
        if failed:
            raise failed[0]
        return temporary

    def publish(self, temporary: str, name: str) -> bool:
        import obstore

        try:
            self._ask(obstore.copy, self._key(temporary), self._key(name))
        except FileNotFoundError:
            return False
        return True

    def create_copy(self, source: str, name: str) -> bool:
        return self.create(name, self.read(source))

    def delete(self, name: str) -> None:
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self._ask(obstore.delete, self._key(name))

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
            for _ in _requests().map(self.delete, names):
                pass
        self.delete(head_copy)

    # --- asking ---

    def _key(self, name: str) -> str:
        assert not {"", ".", ".."} & set(name.split("/")), name
        return f"{self.prefix}/{name}" if self.prefix else name

    def _name(self, key: str) -> str:
        return f"{key}/".removeprefix(f"{self.prefix}/" if self.prefix else "").removesuffix("/")

    def _ask(self, function: Callable[..., Answer], *arguments: Any, **options: Any) -> Answer:
        return _ask(self.scheme, self.bucket, function, *arguments, **options)


# --- asking ---


def _ask(
    scheme: Scheme, bucket: str, function: Callable[..., Answer], *arguments: Any, **options: Any
) -> Answer:
    """Call one of obstore's functions, with retries while the server is away.

    Most retries are here, because Ctrl-C waits while obstore does. And obstore does not retry
    where an answer breaks off, or where a second request might do harm, which none of ours does.
    """
    url = f"{scheme}://{bucket}/{arguments[0] or ''}"
    until, at_once = 0.0, 0
    for pause in _pauses():
        asked = time.monotonic()
        try:
            with translate_errors(url):
                return function(bucket_client(scheme, bucket), *arguments, **options)
        except ConnectionError as error:
            last = error
        failed = time.monotonic()
        until = until or failed + _PATIENCE
        at_once += failed - asked < _SOON
        if at_once == _TRIES or failed > until:
            break
        if failed - asked > _SOON:
            _announce_wait(scheme, bucket)
        time.sleep(pause)
    raise last


@lru_cache
def _announce_wait(scheme: Scheme, bucket: str) -> None:
    """Say so once in a process, since it may take long."""
    sys.stderr.write(f"waiting for the server of {scheme}://{bucket}\n")


def _page(bucket: Any, prefix: str | None, after: str | None) -> list[str]:
    """The next names of a listing."""
    import obstore

    pages = obstore.list(bucket, prefix, offset=after, chunk_size=_PAGE)
    return [item["path"] for item in next(iter(pages), [])]


@lru_cache
def _check_bucket(scheme: Scheme, bucket: str) -> None:
    """Raise NotADirectoryError where there is no such bucket; most errors do not say so."""
    with contextlib.suppress(PermissionError):
        _ask(scheme, bucket, _page, None, None)


@lru_cache
def _check_create_only(scheme: Scheme, bucket: str, prefix: str) -> None:
    """Raise UsageError where a server overwrites on create: no writer would be safe."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    probe = f"{prefix}/{temporary_name('probe', uuid.uuid4().hex)}".removeprefix("/")
    try:
        for _ in range(2):
            _ask(scheme, bucket, obstore.put, probe, b"probe", mode="create")
    except (AlreadyExistsError, PreconditionError):
        return
    finally:
        with contextlib.suppress(FileNotFoundError):
            _ask(scheme, bucket, obstore.delete, probe)
    raise UsageError(
        f"the server of {scheme}://{bucket} ignores If-None-Match, so a writer could overwrite the "
        "data of others; use another server, or a folder"
    )


def _pauses() -> Iterator[float]:
    """Seconds to wait after each try."""
    return (min(_PAUSE * 2.0**number, _LONGEST_PAUSE) for number in itertools.count())


@lru_cache
def _requests() -> ThreadPoolExecutor:
    """Threads that wait for answers."""
    return ThreadPoolExecutor(2 * _CONCURRENCY, "request")


# --- pieces ---


def _first(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Pieces until they have `size` bytes."""
    while size > 0 and (piece := next(pieces, None)) is not None:
        size -= len(piece)
        yield piece


def _keeping(
    pieces: Iterator[bytes], kept: list[bytes], failed: list[BaseException]
) -> Iterator[bytes]:
    """The pieces, which are also kept for a retry; an error of their source is kept in `failed`.

    On a retry, a source that failed would look like one that has ended.
    """
    while True:
        try:
            piece = next(pieces, None)
        except BaseException as error:
            failed.append(error)
            raise
        if piece is None:
            return
        kept.append(piece)
        yield piece
