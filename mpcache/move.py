"""Copy whole stores, and remove them.

What arrives becomes a store at its end, all at once, when `store.json` gets its name: half a copy
is never taken for a store, and the same call goes on with it.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from mpcache.arrays import GROUP
from mpcache.format import (
    MARKS,
    STORE_FILE,
    check_metadata,
    is_store,
    mark_path,
    read_store_file,
    specs,
    store_content,
)
from mpcache.guard import DamagedStoreError, check_place, locate
from mpcache.identity import refuse_other_content
from mpcache.objects import is_temporary, pieces_of, put_new, sync_folders
from mpcache.reader import Store, open_store
from mpcache.writer import Writer

_INCOMING = f"{STORE_FILE}.incoming.partial"  # what is to become store.json


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a copy or a conversion did."""

    store: str
    parts: int
    "parts of arrays, a mark each, that are there now"
    written: int
    "of these, written by this call"
    bytes: int
    "of objects written by this call"
    nonfinite: int = 0
    "values that became infinite in the new dtype"


def copy(path: Path, to: Path, *, quiet: bool = True) -> Moved:
    """Copy what is committed, comparing each object with its mark on the way.

    Goes on with half a copy, and adds to a copy what its source has got since. Memory: a megabyte.

    Raises:
        ValueError: `to` holds something else; nothing was written.
        DamagedStoreError: an object of the source is not what was committed.
    """
    store = open_store(path)
    data = locate(path, STORE_FILE).read_bytes()
    refuse_nesting(path, to)
    receive(to, data)
    writer = Writer(to, store.layout)
    marks = [(part, array) for array in store.arrays for part in store.numbers(array)]
    for array in store.arrays:
        grow_alike(store, array, writer)
    with bar(marks, "copy", quiet) as each:
        written = [copy_part(store, part, array, writer) for part, array in each]
    arrived(to, data)
    return Moved(
        store=str(to), parts=len(marks), written=sum(size > 0 for size in written),
        bytes=sum(written),
    )  # fmt: skip


def bar(marks: list[tuple[int, str]], name: str, quiet: bool) -> "tqdm[Any]":
    return tqdm(marks, desc=name, unit="mark", disable=quiet)


def grow_alike(store: Store, array: str, writer: Writer) -> None:
    """Let a new store's array span the parts of its source's."""
    width = int(store.mark(store.numbers(array)[0], array).get("width", 0))
    writer.grow(array, check_metadata(store.path, specs(array, store.layout, width)[0]), width)


def copy_part(store: Store, part: int, array: str, writer: Writer) -> int:
    """Copy what one mark commits, the mark last; bytes written."""
    told = store.mark(part, array)["objects"]
    sources = {name: _compared(locate(store.path, name), one) for name, one in told.items()}
    mark = locate(store.path, mark_path(part, array)).read_bytes()
    is_new = writer.adopt(part, array, mark, sources)
    return sum(one["bytes"] for one in told.values()) if is_new else 0


def _compared(file: Path, told: Mapping[str, Any]) -> Iterator[bytes]:
    """The bytes of an object; raises at their end if they are not those that the mark names."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        for piece in pieces_of(file):
            digest.update(piece)
            size += len(piece)
            yield piece
    except FileNotFoundError:
        raise DamagedStoreError(f"{file} is missing, though it was committed") from None
    if (size, digest.hexdigest()) != (told["bytes"], told["xxh3_128"]):
        raise DamagedStoreError(f"{file} is damaged: its bytes differ from what was committed")


# --- arriving ---


def refuse_nesting(path: Path, to: Path) -> None:
    source, target = path.resolve(), to.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"{to} and {path} must not lie in each other; name another place")


def receive(to: Path, data: bytes) -> None:
    """Make the place that is to become a store with this `store.json`, or find it again."""
    check_place(to)
    if is_store(to):
        if locate(to, STORE_FILE).read_bytes() != data:
            raise ValueError(f"{to} is another store; name a new or empty folder")
        return
    incoming = locate(to, _INCOMING)
    if not incoming.exists():
        refuse_other_content(to)
        put_new(incoming, data)
    elif incoming.read_bytes() != data:
        raise ValueError(
            f"{to} is half of another copy; finish that one, remove it, or name another place"
        )


def arrived(to: Path, data: bytes) -> None:
    """Make a store of what has arrived."""
    put_new(locate(to, STORE_FILE), data)
    locate(to, _INCOMING).unlink(missing_ok=True)


# --- leaving ---


@dataclass(frozen=True)
class Leaving:
    """What is to be removed: a store, or half a copy, and what earlier removals left of it."""

    path: Path
    told: str
    rests: tuple[Path, ...]


def find_removable(path: Path) -> Leaving:
    """Look at what is to be removed; raises ValueError for what is not certainly a store."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; name the store itself, {path.resolve()}")
    rests = _rests(path)
    if not os.path.lexists(path) and rests:
        return Leaving(path, "the rest of an interrupted removal", rests)
    if not is_store(path) and locate(path, _INCOMING).is_file():
        store_content(locate(path, _INCOMING).read_bytes(), path / _INCOMING)
        told = "an unfinished copy"
    else:
        read_store_file(path)
        told = "a store"
    ours = {STORE_FILE, GROUP, MARKS}
    foreign = sorted(f.name for f in path.iterdir() if f.name not in ours and not is_temporary(f))
    if foreign:
        raise ValueError(
            f"{path} also holds {foreign[0]!r}, which is no part of a store; move it away first"
        )
    return Leaving(path, told, rests)


def remove(leaving: Leaving) -> None:
    """Delete for good. Renamed first: from then on there is no store, whatever happens.

    Links in it are deleted, what they lead to is not.
    """
    path, rests = leaving.path, list(leaving.rests)
    if os.path.lexists(path):
        rest = path.with_name(f".{path.name}.{uuid.uuid4().hex}.removed")
        path.rename(rest)
        sync_folders(rest.parent, rest.parent)
        rests.append(rest)
    for rest in rests:
        (rest / STORE_FILE).unlink(missing_ok=True)
        shutil.rmtree(rest)


def _rests(path: Path) -> tuple[Path, ...]:
    """Folders that interrupted removals of this store have left beside it."""
    if not path.parent.is_dir():
        return ()
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{32}}\.removed")
    found = (rest for rest in path.parent.iterdir() if pattern.fullmatch(rest.name))
    return tuple(sorted(rest for rest in found if rest.is_dir() and not rest.is_symlink()))
