"""Check every byte of a store against its marks, and its marks against themselves.

Memory, for each part in work at a time: 24 MB, or three chunks where these are larger; and for each
mark a few hundred bytes. So the size of parts does not matter.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from mpcache.errors import DamagedStoreError
from mpcache.maintenance.findings import Fault, Finding
from mpcache.maintenance.journal import Journal
from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map
from mpcache.storage.base import Storage, open_storage
from mpcache.storage.tempfiles import digest_pieces, is_temporary
from mpcache.store.array_metadata import check_metadata
from mpcache.store.array_spec import GROUP, ArraySpec
from mpcache.store.format import (
    MARKS,
    POSITION,
    SEQUENCE,
    STORE_FILE,
    TOKENS,
    array_specs,
    committed_length,
    mark_path,
    parse_mark_path,
)
from mpcache.store.part_encoder import values_digest
from mpcache.store.reader import Store, open_store
from mpcache.store.sealed_json import digest
from mpcache.store.zarr_codec import decode_part, read_chunk_ends
from mpcache.validation import is_part


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    marks: int = 0
    objects: int = 0
    bytes: int = 0
    "of objects that were read"
    earlier: int = 0
    "of the marks, those that were found sound earlier, says the journal; their objects are there"
    findings: tuple[Finding, ...] = field(default=())

    @property
    def intact(self) -> bool:
        return not any(finding.damaging for finding in self.findings)


def verify(
    where: str | Path | Storage,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    journal: Path | None = None,
    quiet: bool = True,
) -> Verdict:
    """Check a store; with a journal, go on where earlier calls with the same file stopped.

    Of what the journal calls sound, only existence and size are checked again.

    Raises:
        ValueError: there is no store, or its format version is unknown; or the journal is none of
            this store in this place.
    """
    place = open_storage(where)
    try:
        store = open_store(place)
    except DamagedStoreError as error:
        return Verdict(findings=(Finding("settings", STORE_FILE, str(error)),))
    try:
        marks = [(part, array) for array in store.arrays for part in store.part_numbers(array)]
    except DamagedStoreError as error:
        return Verdict(findings=(Finding("linked", MARKS, str(error)),))
    notes = None if journal is None else Journal(journal, place.address, store.digest)
    checked = _check_marks(store, marks, parallel, notes, quiet)
    findings = (*checked.findings, *_metadata(store), *_incomplete_parts(store), *_strays(store))
    return Verdict(len(marks), checked.objects, checked.bytes, checked.earlier, findings)


# --- what marks commit ---


@dataclass(frozen=True)
class _Checked:
    """What was found under one mark."""

    digest: str
    objects: int
    bytes: int
    "of objects that were read"
    is_known: bool
    "it was found sound earlier"
    findings: tuple[Finding, ...]


def _check_marks(
    store: Store,
    marks: list[tuple[int, str]],
    parallel: ParallelConfig,
    journal: Journal | None,
    quiet: bool,
) -> Verdict:
    names = [mark_path(*mark) for mark in marks]
    known = [None if journal is None else journal.sound(name) for name in names]
    tasks = [(*mark, digest) for mark, digest in zip(marks, known, strict=True)]
    found = ordered_map(functools.partial(_check_mark, store), tasks, parallel, quiet=quiet)
    objects = size = earlier = 0
    findings: list[Finding] = []
    with tqdm(found, "verify", len(marks), unit="mark", disable=quiet) as bar:
        for name, one in zip(names, bar, strict=True):
            objects, size = objects + one.objects, size + one.bytes
            earlier += one.is_known
            findings += one.findings
            if journal is not None and not one.is_known:
                journal.note(name, one.digest, one.findings)
    return Verdict(len(marks), objects, size, earlier, tuple(findings))


def _check_mark(store: Store, task: tuple[int, str, str | None]) -> _Checked:
    part, array, sound = task
    name = mark_path(part, array)
    try:
        mark = store.mark(part, array)
    except DamagedStoreError as error:
        fault = _or_linked("mark", store.storage, name)
        return _Checked("", 0, 0, False, (Finding(fault, name, str(error), (part, array)),))
    found, readable = [], []
    for spec in array_specs(array, store.layout, mark.width):
        object_name = spec.object_path(part)
        if fault_told := _size_fault(store, object_name, mark.objects[object_name].bytes):
            found.append(Finding(fault_told[0], object_name, fault_told[1], (part, array)))
        else:
            readable.append(spec)
    mark_digest = digest(mark.as_json())
    is_known = mark_digest == sound and not found
    size = 0
    for spec in () if is_known else readable:
        object_name = spec.object_path(part)
        size += mark.objects[object_name].bytes
        if reason := _content_fault(store, part, array, spec):
            found.append(Finding("flipped", object_name, reason, (part, array)))
    return _Checked(mark_digest, len(mark.objects), size, is_known, tuple(found))


def _or_linked(fault: Fault, place: Storage, name: str) -> Fault:
    """A fault, unless what is damaged is the way to it."""
    try:
        place.size(name)
    except DamagedStoreError:
        return "linked"
    return fault


def _size_fault(store: Store, name: str, committed: int) -> tuple[Fault, str] | None:
    """What is wrong with an object that need not be read to see it."""
    try:
        size = store.storage.size(name)
    except DamagedStoreError as error:
        return "linked", str(error)
    if size is None:
        return "missing", "committed, but not there"
    if size != committed:
        fault: Fault = "truncated" if size < committed else "overlong"
        return fault, f"{size} bytes, committed were {committed}"
    return None


def _content_fault(store: Store, part: int, array: str, spec: ArraySpec) -> str | None:
    """What is wrong with the bytes of an object that has its size."""
    mark, name = store.mark(part, array), spec.object_path(part)
    committed = mark.objects[name]
    if digest_pieces(store.storage.read_pieces(name)) != committed.xxh3_128:
        return "its bytes differ from what was committed"
    length = committed_length(spec, array, mark.rows, store.ctx_len)
    try:
        found = values_digest(_values(store.storage, name, committed.bytes, spec, length))
    except (ValueError, RuntimeError) as error:  # RuntimeError is Blosc's
        return str(error)
    if found != committed.values_xxh3_128:
        return "decodes to other values than were committed"
    return None


def _values(
    place: Storage, name: str, size: int, spec: ArraySpec, length: int
) -> Iterator[np.ndarray]:
    """What an object decodes to, whole chunks at a time; its array's metadata may be damaged."""
    read = functools.partial(place.read_into, name)
    ends = read_chunk_ends(spec, read, size)
    return (decode_part(spec, read, ends, *span) for span in spec.steps(length))


# --- what the layout implies ---


def _metadata(store: Store) -> Iterator[Finding]:
    """Faults of `zarr.json` files; all arrays of a store span the same number of parts."""
    implied: dict[str, bytes] = {}
    for _, spec in all_specs(store):
        try:
            check_metadata(store.storage, spec)
        except DamagedStoreError as error:
            fault = _or_linked("metadata", store.storage, spec.metadata_path)
            yield Finding(fault, spec.metadata_path, str(error))
        implied |= {n: data for n, data in spec.metadata(1).items() if n != spec.metadata_path}
    for name, data in implied.items():
        yield from _group_findings(store.storage, name, data)
    found = spans(store)
    usual = usual_span(found)
    for name, span in found.items():
        if span != usual:
            yield Finding("metadata", name, f"spans {span} parts, other arrays {usual}")


def spans(store: Store) -> dict[str, int]:
    """How many parts each array's `zarr.json` spans, of those that are sound."""
    found = {}
    for _, spec in all_specs(store):
        with contextlib.suppress(DamagedStoreError):
            found[spec.metadata_path] = check_metadata(store.storage, spec)
    return found


def usual_span(found: Mapping[str, int]) -> int:
    """The span of most arrays."""
    return max(found.values(), key=list(found.values()).count, default=0)


def all_specs(store: Store) -> Iterator[tuple[str, ArraySpec]]:
    """The Zarr arrays that a store has by its marks, each with the name that marks give it."""
    for array in store.arrays:
        widths = (_width(store, part, array) for part in store.part_numbers(array))
        width = next((found for found in widths if found is not None), None)
        if width is not None:  # else all its marks are damaged
            yield from ((array, spec) for spec in array_specs(array, store.layout, width))


def _width(store: Store, part: int, array: str) -> int | None:
    try:
        return store.mark(part, array).width
    except DamagedStoreError:
        return None


def _group_findings(place: Storage, name: str, implied: bytes) -> Iterator[Finding]:
    try:
        found = None if place.size(name) is None else place.read(name)
    except DamagedStoreError as error:
        yield Finding("linked", name, str(error))
        return
    if found is None:
        yield Finding("metadata", name, "group metadata is not there")
    elif found != implied:
        yield Finding("metadata", name, "group metadata differs from what Zarr writes")


def _incomplete_parts(store: Store) -> Iterator[Finding]:
    """Activations without the tokens or rows that say what they are."""
    needed = {array: set(store.part_numbers(array)) for array in (TOKENS, SEQUENCE, POSITION)}
    for array in (name for name in store.arrays if name.startswith("acts/")):
        for other, there in needed.items():
            for part in sorted(set(store.part_numbers(array)) - there):
                name = mark_path(part, other)
                yield Finding("missing", name, f"{array} has this part", (part, other))


# --- what neither accounts for ---


def _strays(store: Store) -> Iterator[Finding]:
    """Objects that no mark vouches for."""
    names = _Names(store)
    for name in store.storage.object_names():
        if names.is_known(name):
            continue
        if store.storage.is_link(name):
            yield Finding("foreign", name, "a symbolic link; never followed")
        elif is_temporary(name):
            yield Finding("leftover", name, "rest of an interrupted write")
        elif names.is_expected(name):
            yield Finding("uncommitted", name, "written, but not committed")
        else:
            yield Finding("foreign", name, "not part of a store")


class _Names:
    """The names that marks and arrays account for; no list, because there may be millions."""

    def __init__(self, store: Store) -> None:
        found = list(all_specs(store))
        self.files = {STORE_FILE, *(name for _, spec in found for name in spec.metadata(1))}
        self.arrays = {spec.name: (array, spec) for array, spec in found}
        self.parts = {array: set(store.part_numbers(array)) for array in store.arrays}

    def is_known(self, name: str) -> bool:
        """Whether a mark, or the store's being there, needs this object."""
        if name in self.files or parse_mark_path(PurePosixPath(name)) is not None:
            return True
        found = self._placed(name)
        return found is not None and found[1] in self.parts[found[0]]

    def is_expected(self, name: str) -> bool:
        """Whether it may be what a collection wrote that has not committed it yet."""
        array, _, _ = name.removeprefix(f"{GROUP}/").rpartition("/c/")
        is_new = name.startswith(f"{GROUP}/") and array not in self.arrays
        return is_new or self._placed(name) is not None

    def _placed(self, name: str) -> tuple[str, int] | None:
        """Array and part of an object, if it is where an array of the store would have it."""
        place, _, indices = name.removeprefix(f"{GROUP}/").rpartition("/c/")
        number = indices.split("/")[0]
        if place not in self.arrays or not is_part(number):
            return None
        array, spec = self.arrays[place]
        return (array, int(number)) if spec.object_path(int(number)) == name else None
