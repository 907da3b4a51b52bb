"""Check one mark of a store, and the bytes of the objects that the mark commits."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpcache.errors import DamagedStoreError
from mpcache.maintenance.findings import Fault, Finding
from mpcache.storage.base import Storage
from mpcache.store.array_spec import ArraySpec
from mpcache.store.digests import digest_pieces, values_digest
from mpcache.store.object_paths import array_specs, committed_length, mark_path
from mpcache.store.reader import Store
from mpcache.store.sealed_json import digest
from mpcache.store.zarr_codec import decode_part, read_chunk_ends


@dataclass(frozen=True)
class MarkToCheck:
    """A mark, and what an earlier check said of it."""

    part: int
    array: str
    intact_digest: str | None = None
    "digest of the mark that was intact earlier, with its objects"


@dataclass(frozen=True)
class MarkCheck:
    """The result of the check of one mark."""

    digest: str
    "of the mark; empty if the mark is damaged"
    objects: int
    bytes: int
    "of objects that were read"
    was_intact: bool
    "an earlier check found it intact, so that its objects were not read again"
    findings: tuple[Finding, ...]


def check_mark_and_objects(store: Store, task: MarkToCheck) -> MarkCheck:
    """Check a mark and its objects: their existence and size, and their bytes unless known."""
    part, array = task.part, task.array
    name = mark_path(part, array)
    try:
        mark = store.mark(part, array)
    except DamagedStoreError as error:
        fault = linked_or("mark", store.storage, name)
        return MarkCheck("", 0, 0, False, (Finding(fault, name, str(error), (part, array)),))
    findings, readable = [], []
    for spec in array_specs(array, store.layout, mark.width):
        object_name = spec.object_path(part)
        if fault_of_size := _size_fault(store, object_name, mark.objects[object_name].bytes):
            fault, message = fault_of_size
            findings.append(Finding(fault, object_name, message, (part, array)))
        else:
            readable.append(spec)
    mark_digest = digest(mark.as_json())
    was_intact = mark_digest == task.intact_digest and not findings
    size = 0
    for spec in () if was_intact else readable:
        object_name = spec.object_path(part)
        size += mark.objects[object_name].bytes
        if (reason := content_fault(store, part, array, spec)) is not None:
            findings.append(Finding("flipped", object_name, reason, (part, array)))
    return MarkCheck(mark_digest, len(mark.objects), size, was_intact, tuple(findings))


def linked_or(fault: Fault, storage: Storage, name: str) -> Fault:
    """The fault, or "linked" if a folder on the way to the object is a link."""
    try:
        storage.size(name)
    except DamagedStoreError:
        return "linked"
    return fault


def _size_fault(store: Store, name: str, committed: int) -> tuple[Fault, str] | None:
    """A fault of an object that shows without reading it."""
    try:
        size = store.storage.size(name)
    except DamagedStoreError as error:
        return "linked", str(error)
    if size is None:
        return "missing", "recorded by the store, but missing"
    if size != committed:
        fault: Fault = "truncated" if size < committed else "overlong"
        return fault, f"has {size} bytes, but the store recorded {committed}"
    return None


def content_fault(store: Store, part: int, array: str, spec: ArraySpec) -> str | None:
    """What is wrong with the bytes of an object of the right size; None if nothing is."""
    mark, name = store.mark(part, array), spec.object_path(part)
    committed = mark.objects[name]
    if digest_pieces(store.storage.read_pieces(name)) != committed.xxh3_128:
        return "its bytes differ from what was committed"
    length = committed_length(spec, array, mark.rows, store.ctx_len)
    try:
        values = _decode(store.storage, name, committed.bytes, spec, length)
        values_xxh3 = values_digest(values)
    except (ValueError, RuntimeError) as error:  # RuntimeError is Blosc's
        return str(error)
    if values_xxh3 != committed.values_xxh3_128:
        return "its values differ from those that were committed"
    return None


def _decode(
    storage: Storage, name: str, size: int, spec: ArraySpec, length: int
) -> Iterator[np.ndarray]:
    """The values of an object, whole chunks at a time. Does not use its array's `zarr.json`."""
    read = functools.partial(storage.read_into, name)
    ends = read_chunk_ends(spec, read, size)
    return (decode_part(spec, read, ends, *span) for span in spec.steps(length))
