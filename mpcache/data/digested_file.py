"""One file of a dataset: opened once, then digested and read through the same descriptor.

A file that replaces it later is never read. A change in place raises an error: when the size or the
times differ from those at the digest, the content is digested again and compared.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import os
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from mpcache.errors import UsageError, first_line

COMPRESSIONS = (".gz", ".zst")
_COPY_BYTES = 1 << 20
_HEAD_BYTES = 512
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
# a change so soon after the digest can leave the time stamps equal: clocks of files are coarse
_COARSE_NS = 2_000_000_000


class DataFile:
    """An open regular file and its sha256. Raises UsageError, which names the file."""

    descriptor = -1

    def __init__(self, path: Path, name: str, *, may_be_empty: bool = False) -> None:
        self.path, self.name = path, name
        self.compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
        self.descriptor = _open_regular(path, name)
        try:
            size = self._stamp()[0]
            if not size and not may_be_empty:
                raise UsageError(
                    f"a data file must hold a document, got the empty file {name}; remove the "
                    "file, or download it again"
                )
            _check_no_pointer(os.pread(self.descriptor, _HEAD_BYTES, 0), name)
            self.digest = self._digest()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor. Closing twice is harmless."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    # --- what was digested is what is read ---

    def _stamp(self) -> tuple[int, int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _digest(self) -> str:
        self.stamp, self.digested_ns = self._stamp(), time.time_ns()
        with self.raw() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check_unchanged(self, *, thorough: bool = True) -> None:
        """Raise UsageError if the content differs from what was digested.

        `thorough` also finds a change too soon after the digest to show in the time stamps.
        """
        may_hide_change = self.digested_ns - max(self.stamp[1:]) < _COARSE_NS
        if self._stamp() == self.stamp and not (thorough and may_hide_change):
            return
        before = self.digest  # changed times alone are harmless: the file may have been renamed
        if self._digest() != before:
            raise UsageError(
                f"{self.name} changed while mpcache read it; wait until no program writes to the "
                "file, then run the same command again"
            )

    # --- reading ---

    def raw(self) -> io.BufferedReader:
        """The bytes of the file from its start."""
        return io.BufferedReader(_DescriptorStream(self.descriptor), _COPY_BYTES)

    @contextlib.contextmanager
    def stream(self) -> Iterator[io.BufferedIOBase]:
        """The content from its start, decompressed."""
        with self.raw() as raw:
            if self.compression == ".gz":
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    yield io.BufferedReader(unzipped, _COPY_BYTES)
            elif self.compression == ".zst":
                with pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as unzipped:
                    yield io.BufferedReader(_ArrowStream(unzipped), _COPY_BYTES)
            else:
                yield raw

    @contextlib.contextmanager
    def seekable(self) -> Iterator[io.BufferedIOBase]:
        """The decompressed content as a seekable stream; a compressed file is copied first."""
        if not self.compression:
            with self.raw() as raw:
                yield raw
            return
        with temporary_file() as copy:
            with self.stream() as stream:
                while piece := stream.read(_COPY_BYTES):
                    copy.write(piece)
            copy.seek(0)
            yield copy

    @contextlib.contextmanager
    def explained(self, kind: str) -> Iterator[None]:
        """Turn errors of a library that reads the file into a UsageError of one line."""
        try:
            yield
        except (pa.ArrowException, EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a fault of the disk, not of the content
            raise UsageError(
                f"{self.name} cannot be read as {kind}: {first_line(error)}; the file may be cut "
                "short or damaged: write or download it again"
            ) from error


class _DescriptorStream(io.RawIOBase):
    """A stream with its own position, so that several can share a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.position = descriptor, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = os.fstat(self.descriptor).st_size
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position}.get(whence, size)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self.descriptor, [buffer], self.position)
        self.position += count
        return count


class _ArrowStream(io.RawIOBase):
    """A stream of pyarrow as a raw stream of Python."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self.stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def temporary_file() -> io.BufferedRandom:
    """A file without a name, which disappears when it is closed or the process ends."""
    return cast(io.BufferedRandom, tempfile.TemporaryFile(prefix="mpcache-", buffering=_COPY_BYTES))


def _open_regular(path: Path, name: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | os.O_NONBLOCK)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise UsageError(
                f"{name} is a link to {os.readlink(path)}, which does not exist; correct the "
                "link, or download the file again"
            ) from error
        raise UsageError(f"the dataset file {name} does not exist; correct --dataset") from error
    except PermissionError as error:
        raise UsageError(
            f"{name} cannot be read: {error.strerror}; make the file readable, or give another "
            "file with --dataset"
        ) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{name} is a link to itself; correct the link") from error
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{name} is too long for a path; correct --dataset") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(
            f"{name} must be a regular file, got a folder or a special file; give a data file"
        )
    return descriptor


def _check_no_pointer(head: bytes, name: str) -> None:
    if is_lfs_pointer(head):
        raise UsageError(
            f"{name} is a Git LFS pointer, not the data itself; run git lfs pull in the cloned "
            "repository"
        )


def is_lfs_pointer(head: bytes) -> bool:
    """Whether the first bytes of a file are a Git LFS pointer, which stands for the real file."""
    return head.startswith(_LFS)


def is_markup(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an HTML or XML page."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES)


def is_web_page(file: DataFile) -> bool:
    """Whether the content is an HTML page, such as the answer to a wrong URL."""
    unreadable = contextlib.suppress(OSError, EOFError, zlib.error, pa.ArrowException)
    with unreadable, file.stream() as stream:
        return is_markup(stream.read(_HEAD_BYTES))
    return False
