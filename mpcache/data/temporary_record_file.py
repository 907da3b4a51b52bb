"""Byte records in an unnamed temporary file, read at random; 8 bytes of memory per record."""

import errno
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Int64

from mpcache.data.digested_file import temporary_file


class TemporaryRecordFile:
    """An append-only list of byte records. All are added first, then they are read."""

    def __init__(self) -> None:
        self.file = temporary_file()
        self.lengths = array("q")
        self.offsets: np.ndarray | None = None

    def __del__(self) -> None:
        self.file.close()

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, record: bytes) -> None:
        """Add one record."""
        with _explain_full_disk():
            self.file.write(record)
        self.lengths.append(len(record))

    def add_all(self, records: bytes | memoryview, lengths: Int64[np.ndarray, " _"]) -> None:
        """Add records that follow each other in one buffer; `lengths` in bytes."""
        with _explain_full_disk():
            self.file.write(records)
        self.lengths.frombytes(lengths.tobytes())

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return sum(self.lengths)

    def finish(self) -> None:
        """End the additions. Records can be read from now on."""
        with _explain_full_disk():
            self.file.flush()
        lengths = np.frombuffer(self.lengths, np.int64) if self.lengths else np.zeros(0, np.int64)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    def __getitem__(self, index: int) -> bytes:
        assert self.offsets is not None
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return read_exactly(self.file.fileno(), end - start, start)


def read_exactly(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes of a file, or fewer at its end; one system call reads at most 2 GiB."""
    pieces = []
    while count and (piece := os.pread(descriptor, count, offset)):
        pieces.append(piece)
        offset, count = offset + len(piece), count - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextmanager
def _explain_full_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            "the disk has no space for the temporary copy of the documents in "
            f"{tempfile.gettempdir()}; set the environment variable TMPDIR to a folder with more "
            "space",
        ) from error
