"""Ways in which a store can be damaged."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from mpcache.store.sealed_json import seal, unseal

ACTS = "arrays.zarr/acts/layers.0/output"


OBJECT, MARK = f"{ACTS}/c/2/0", "marks/2/layers.0/output.json"


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def in_the_index(store: Path) -> None:
    """Damage the length of a chunk: the last 8 bytes before the checksum of a shard's index."""
    data = (store / OBJECT).read_bytes()
    (length,) = struct.unpack("<Q", data[-12:-4])
    assert 0 < length < len(data)
    flip(store / OBJECT, len(data) - 12)


def edited(store: Path) -> None:
    """A mark edited by hand and sealed again."""
    mark = unseal((store / MARK).read_bytes(), MARK)
    mark["rows"] = 10_000
    (store / MARK).write_bytes(seal(mark))


def metadata_edited(store: Path) -> None:
    content = json.loads((store / f"{ACTS}/zarr.json").read_bytes())
    content["fill_value"] = 7
    (store / f"{ACTS}/zarr.json").write_text(json.dumps(content, indent=2))


def linked(store: Path) -> None:
    (store / OBJECT).unlink()
    (store / OBJECT).symlink_to(store / f"{ACTS}/c/0/0")


HARM: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "object deleted": (lambda s: (s / OBJECT).unlink(), {OBJECT: "missing"}),
    "object cut short": (lambda s: os.truncate(s / OBJECT, 1000), {OBJECT: "truncated"}),
    "object emptied": (lambda s: os.truncate(s / OBJECT, 0), {OBJECT: "truncated"}),
    "object grown": (
        lambda s: (s / OBJECT).write_bytes((s / OBJECT).read_bytes() + b"more"),
        {OBJECT: "overlong"},
    ),
    "bit in a chunk": (lambda s: flip(s / OBJECT, 100), {OBJECT: "flipped"}),
    "bit in a checksum": (lambda s: flip(s / OBJECT, 32 * 32 + 1), {OBJECT: "flipped"}),
    "bit in the index": (in_the_index, {OBJECT: "flipped"}),
    "objects of two parts swapped": (
        lambda s: swap(s / OBJECT, s / f"{ACTS}/c/0/0"),
        {OBJECT: "flipped", f"{ACTS}/c/0/0": "flipped"},
    ),
    "bit in a mark": (lambda s: flip(s / MARK, 50), {MARK: "mark"}),
    "mark edited and sealed": (edited, {MARK: "mark"}),
    "mark of another part": (
        lambda s: shutil.copy(s / "marks/0/layers.0/output.json", s / MARK),
        {MARK: "mark"},
    ),
    "mark of another store": (
        lambda s: shutil.copy(s.parent / "other" / MARK, s / MARK),
        {MARK: "mark"},
    ),
    "mark of tokens deleted": (
        lambda s: (s / "marks/2/tokens.json").unlink(),
        {"marks/2/tokens.json": "missing", "arrays.zarr/tokens/c/2/0": "uncommitted"},
    ),
    "array metadata edited": (metadata_edited, {f"{ACTS}/zarr.json": "metadata"}),
    "group metadata deleted": (
        lambda s: (s / "arrays.zarr/acts/zarr.json").unlink(),
        {"arrays.zarr/acts/zarr.json": "metadata"},
    ),
    "settings": (lambda s: flip(s / "store.json", 200), {"store.json": "settings"}),
    "object that is a link": (linked, {OBJECT: "linked"}),
    "mark deleted": (
        lambda s: (s / MARK).unlink(),
        {
            OBJECT: "uncommitted",
            "arrays.zarr/norms/layers.0/output/c/2": "uncommitted",
            "arrays.zarr/moments/layers.0/output/c/2/0/0": "uncommitted",
        },
    ),
    "file of somebody else": (
        lambda s: (s / "notes.txt").write_text("mine"),
        {"notes.txt": "foreign"},
    ),
    "object that no array has": (
        lambda s: (s / f"{ACTS}/c/2/1").write_text("more"),
        {f"{ACTS}/c/2/1": "foreign"},
    ),
    "rest of a write": (
        lambda s: (s / f"{OBJECT}.ab.partial").write_text("half"),
        {f"{OBJECT}.ab.partial": "leftover"},
    ),
}
