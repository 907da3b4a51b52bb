"""Requests to one bucket, with retries while its server is away. Keys count from the bucket's top.

Most retries are here and not in obstore, because Ctrl-C waits while obstore does. And obstore does
not retry where an answer breaks off, or where a second request might do harm, which none here does.

Memory: an object is held whole while it is uploaded, because its server may lose it halfway.
Reading holds eight pieces of 8 MiB of each object.
"""

import contextlib
import itertools
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from mpcache.errors import UsageError
from mpcache.storage.cloud_connection import Scheme, bucket_client, translate_errors
from mpcache.storage.temporary_names import temporary_name

CONCURRENCY = 8  # simultaneous requests for one object, up or down
PART_BYTES = 8 << 20  # of a request; servers want at least 5 MiB in all parts but the last
_PAGE = 1000  # names in one answer; servers give no more
_TRIES = 5  # for requests that fail at once
_SOON = 1.0  # seconds; obstore has tried more than once where it gives up later than this
_PATIENCE = 120.0  # seconds that a server may be away before the command ends
_PAUSE = 0.2  # seconds before the second try, doubled for each later one
_LONGEST_PAUSE = 10.0

Answer = TypeVar("Answer")


class Bucket:
    """Objects of a bucket by key. Threads may share it."""

    def __init__(self, scheme: Scheme, name: str) -> None:
        self.scheme: Scheme = scheme
        self.name = name

    def __str__(self) -> str:
        return f"{self.scheme}://{self.name}"

    def request(self, function: Callable[..., Answer], *arguments: Any, **options: Any) -> Answer:
        """Call one of obstore's functions, with retries while the server is away."""
        url = f"{self}/{arguments[0] or ''}"
        until, failed_at_once = 0.0, 0
        for pause in _pauses():
            started = time.monotonic()
            try:
                with translate_errors(url):
                    return function(bucket_client(self.scheme, self.name), *arguments, **options)
            except ConnectionError as error:
                last = error
            failed = time.monotonic()
            until = until or failed + _PATIENCE
            failed_at_once += failed - started < _SOON
            if failed_at_once == _TRIES or failed > until:
                break
            if failed - started > _SOON:
                _announce_wait(str(self))
            time.sleep(pause)
        raise last

    def keys(self, prefix: str | None) -> Iterator[str]:
        """All keys below a prefix, in order."""
        last = None
        while page := self.request(_page, prefix, last):
            yield from page
            if len(page) < _PAGE:
                return
            last = page[-1]

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if it is not there."""
        import obstore

        try:
            return int(self.request(obstore.head, key)["size"])
        except FileNotFoundError:
            _check_bucket(self.scheme, self.name)  # a missing bucket gives the same answer
            return None

    def read_range(self, key: str, offset: int, length: int) -> np.ndarray:
        """Bytes of an object; ValueError if it ends before."""
        import obstore

        try:
            answer = self.request(obstore.get_range, key, start=offset, length=length)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if offset < (self.size(key) or 0):
                raise
            answer = obstore.Bytes()
        data = np.frombuffer(memoryview(answer), np.uint8)
        if len(data) != length:
            raise ValueError(f"the object ends before byte {offset + length}")
        return data

    def read_pieces(self, key: str) -> Iterator[bytes]:
        """The bytes of an object, several pieces requested at a time."""
        size = self.size(key)
        if size is None:
            raise FileNotFoundError(f"{self}/{key}")
        waiting: deque[Future[np.ndarray]] = deque()
        for offset in range(0, size, PART_BYTES):
            if len(waiting) == CONCURRENCY:
                yield waiting.popleft().result().tobytes()
            length = min(PART_BYTES, size - offset)
            waiting.append(request_threads().submit(self.read_range, key, offset, length))
        while waiting:
            yield waiting.popleft().result().tobytes()

    def create(self, key: str, data: bytes, probe_prefix: str) -> bool:
        """Write an object that must not exist yet; False if another object is there.

        Raises UsageError where the server overwrites on create, which is tried once, with an object
        below `probe_prefix`.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        if self.size(key) is not None:  # saves a write, and works where writing is forbidden
            return False
        _check_create_only(self.scheme, self.name, probe_prefix)
        for pause in itertools.islice(_pauses(), _TRIES):
            try:
                self.request(obstore.put, key, data, mode="create")
            except (AlreadyExistsError, PreconditionError):
                # a retry after a lost answer finds our own object; a process that loses to another
                # process that is not done yet finds nothing
                with contextlib.suppress(FileNotFoundError):
                    return self.read(key) == data
                time.sleep(pause)
            else:
                return True
        raise ConnectionError(
            f"{self}/{key} can be neither written nor read; check your permissions in the "
            "bucket, then run the same command again"
        )

    def read(self, key: str) -> bytes:
        """The bytes of a small object."""
        return self.request(_read, key)

    def upload(self, key: str, pieces: Iterable[bytes]) -> None:
        """Write an object over what is there, in several parts at a time if it is large."""
        import obstore

        source = _Source(pieces)
        if source.read_ahead(PART_BYTES) < PART_BYTES:
            self.request(obstore.put, key, b"".join(source.kept))
            return

        def put(client: Any, path: str) -> None:
            try:
                obstore.put(
                    client, path, source.pieces(),
                    use_multipart=True, chunk_size=PART_BYTES, max_concurrency=CONCURRENCY,
                )  # fmt: skip
            except FileNotFoundError:
                # done, but the answer was lost: the retry finds no upload any more
                if source.error is None and obstore.head(client, path)["size"] != source.size:
                    raise
            except Exception:
                if source.error is None:  # else the source failed, not this server: no retry
                    raise

        self.request(put, key)
        if source.error is not None:
            raise source.error


class _Source:
    """Pieces of an object, kept for a retry.

    An error of the pieces is kept too: on a retry, the failed iterator would just have ended.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.kept: list[bytes] = []
        self.error: BaseException | None = None
        self._rest = iter(pieces)

    @property
    def size(self) -> int:
        """Bytes that were read so far."""
        return sum(map(len, self.kept))

    def read_ahead(self, size: int) -> int:
        """Read pieces until there are `size` bytes or no more pieces; bytes read."""
        while self.size < size and (piece := next(self._rest, None)) is not None:
            self.kept.append(piece)
        return self.size

    def pieces(self) -> Iterator[bytes]:
        """All pieces, from the first on."""
        yield from self.kept.copy()
        while True:
            try:
                piece = next(self._rest, None)
            except BaseException as error:
                self.error = error
                raise
            if piece is None:
                return
            self.kept.append(piece)
            yield piece


@lru_cache
def request_threads() -> ThreadPoolExecutor:
    """Threads that wait for answers."""
    return ThreadPoolExecutor(2 * CONCURRENCY, "request")


def _read(client: Any, key: str) -> bytes:
    import obstore

    return obstore.get(client, key).bytes().to_bytes()


def _page(client: Any, prefix: str | None, after: str | None) -> list[str]:
    """The next keys of a listing."""
    import obstore

    pages = obstore.list(client, prefix, offset=after, chunk_size=_PAGE)
    return [item["path"] for item in next(iter(pages), [])]


def _pauses() -> Iterator[float]:
    """Seconds to wait after each try."""
    return (min(_PAUSE * 2.0**number, _LONGEST_PAUSE) for number in itertools.count())


@lru_cache
def _announce_wait(url: str) -> None:
    """Say once in a process that it waits, since the wait may be long."""
    sys.stderr.write(f"waiting for the server of {url}\n")


@lru_cache
def _check_bucket(scheme: Scheme, name: str) -> None:
    """Raise NotADirectoryError where there is no such bucket; most errors do not say so."""
    with contextlib.suppress(PermissionError):
        Bucket(scheme, name).request(_page, None, None)


@lru_cache
def _check_create_only(scheme: Scheme, name: str, prefix: str) -> None:
    """Raise UsageError where a server overwrites on create: no writer would be safe."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    bucket = Bucket(scheme, name)
    probe = f"{prefix}/{temporary_name('probe', uuid.uuid4().hex)}".removeprefix("/")
    try:
        for _ in range(2):
            bucket.request(obstore.put, probe, b"probe", mode="create")
    except (AlreadyExistsError, PreconditionError):
        return
    finally:
        with contextlib.suppress(FileNotFoundError):
            bucket.request(obstore.delete, probe)
    raise UsageError(
        f"the server of {bucket} ignores the HTTP header If-None-Match, so two writers could "
        "overwrite each other's data; use another server, or a local folder"
    )
