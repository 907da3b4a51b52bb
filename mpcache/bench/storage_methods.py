"""Methods to keep rows in a folder, for measurements: the store format, and a plain file.

Shapes: R rows of a part, W width.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpcache.config import CollectConfig
from mpcache.storage.local import LocalStorage
from mpcache.store.fingerprint import create_or_check_store, layout_of
from mpcache.store.object_paths import acts_array
from mpcache.store.reader import open_store
from mpcache.store.sealed_json import digest
from mpcache.store.writer import Writer

HOOKPOINT, SIDE = "rows", "output"
ARRAY = acts_array(HOOKPOINT, SIDE)
_PIECE = 1 << 20  # bytes that a plain file is written and read at once


@dataclass(frozen=True)
class StorageMethod:
    """A method to keep rows in a folder."""

    name: str
    write: Callable[[Path, Tensor, int], None]
    "called with the folder, the rows `[R, W]` of a part, and how many times to write this part"
    read: Callable[[Path], int]
    "reads all rows into memory; returns their number"


def touch_rows(x_RW: Tensor | np.ndarray) -> int:
    """Use a value of each row, because a memory map alone reads nothing. Returns the rows."""
    float(x_RW[:, -1].sum())
    return len(x_RW)


def sync_file(file: Path) -> None:
    """Force a file to the disk, whichever process wrote it."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def store_format(config: CollectConfig, threads: int) -> StorageMethod:
    """What `collect` does to write the parts of one array, and what a loader does to read them."""
    layout, dtype = layout_of(config, "uint16"), getattr(torch, config.dtype)

    def write(folder: Path, x_RW: Tensor, parts: int) -> None:
        storage = LocalStorage(folder / "store")
        provenance = {"model": {"model": config.model}, "dataset": {"dataset": config.dataset}}
        identity = {"seed": 0}
        create_or_check_store(storage, config, identity, layout, provenance)
        writer = Writer(storage, layout, digest(identity))
        writer.grow(ARRAY, parts, x_RW.shape[1])
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: writer.commit_acts(part, ARRAY, x_RW), range(parts)))

    def read(folder: Path) -> int:
        store = open_store(folder / "store")
        per_part = range(layout.part_rows // layout.chunk_rows)
        chunks = iter([(part, chunk) for part in store.part_numbers(ARRAY) for chunk in per_part])

        def read_some(_: int) -> int:  # like the loader: several chunks a task, into reused memory
            buffer = torch.empty(layout.chunk_rows, store.width(HOOKPOINT, SIDE), dtype=dtype)
            return sum(
                touch_rows(store.acts.read_chunk(HOOKPOINT, SIDE, part, chunk, buffer))
                for part, chunk in chunks
            )

        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(read_some, range(threads)))

    return StorageMethod("mpcache", write, read)


def plain_file() -> StorageMethod:
    """The same bytes in one file: written a megabyte at a time, synced, read into one buffer."""

    def write(folder: Path, x_RW: Tensor, parts: int) -> None:
        data = x_RW.view(torch.uint8).numpy().reshape(-1).data
        (folder / "width").write_text(str(x_RW.shape[1] * x_RW.element_size()))
        with (folder / "rows").open("wb") as file:
            for _, start in itertools.product(range(parts), range(0, len(data), _PIECE)):
                file.write(data[start : start + _PIECE])
        sync_file(folder / "rows")

    def read(folder: Path) -> int:
        buffer, size = bytearray(_PIECE), 0
        with (folder / "rows").open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
        return size // int((folder / "width").read_text())

    return StorageMethod("plain file", write, read)
