"""Check every byte of a store against its marks, and its marks against themselves."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dask.base import compute
from dask.delayed import delayed
from tqdm import tqdm

from mpcache.arrays import GROUP, ArraySpec
from mpcache.format import (
    MARKS,
    POSITION,
    SEQUENCE,
    STORE_FILE,
    TOKENS,
    check_metadata,
    committed_length,
    mark_path,
    marked_array,
    read_store_file,
    specs,
)
from mpcache.guard import DamagedStoreError
from mpcache.objects import digest_of, is_temporary
from mpcache.place import Place, place_of
from mpcache.reader import Store, open_store
from mpcache.writer import values_digest

Fault = Literal["missing", "truncated", "changed", "uncommitted", "foreign", "leftover"]
_HARMLESS = {"uncommitted", "foreign", "leftover"}


@dataclass(frozen=True)
class Finding:
    """One thing in a store that is not as it should be."""

    fault: Fault
    path: str
    told: str

    @property
    def damaging(self) -> bool:
        """Whether committed data is affected; the rest of an interrupted run is not damage."""
        return self.fault not in _HARMLESS


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    marks: int
    objects: int
    bytes: int
    findings: tuple[Finding, ...] = field(default=())

    @property
    def intact(self) -> bool:
        return not any(finding.damaging for finding in self.findings)


def verify(where: str | Path | Place, *, quiet: bool = True) -> Verdict:
    """Check a store; memory stays under one part of one array per thread.

    Raises:
        ValueError: there is no store, or its format version is unknown.
    """
    place = place_of(where)
    try:
        read_store_file(place)
    except DamagedStoreError as error:
        return Verdict(0, 0, 0, (Finding("changed", STORE_FILE, str(error)),))
    try:
        store = open_store(place)
        marks = [(part, array) for array in store.arrays for part in store.numbers(array)]
    except DamagedStoreError as error:
        return Verdict(0, 0, 0, (Finding("changed", MARKS, str(error)),))
    with tqdm(total=len(marks), desc="verify", unit="mark", disable=quiet) as bar:
        tasks = [delayed(_checked)(store, part, array, bar) for part, array in marks]
        checked: tuple[_Checked, ...] = compute(*tasks, scheduler="threads")
    known = {name for one in checked for name in one.objects} | {STORE_FILE}
    findings = [finding for one in checked for finding in one.findings]
    findings += _metadata_findings(store, known)
    findings += _incomplete_parts(store)
    findings += _strays(place, known)
    return Verdict(
        len(marks),
        sum(len(c.objects) for c in checked),
        sum(c.bytes for c in checked),
        tuple(findings),
    )


@dataclass(frozen=True)
class _Checked:
    objects: tuple[str, ...]
    bytes: int
    findings: tuple[Finding, ...]


def _checked(store: Store, part: int, array: str, bar: "tqdm[Any]") -> _Checked:
    bar.update()
    name = mark_path(part, array)
    try:
        mark = store.mark(part, array)
    except DamagedStoreError as error:
        return _Checked((), 0, (Finding("changed", name, str(error)),))
    specs_of = specs(array, store.layout, int(mark.get("width", 0)))
    findings = [f for spec in specs_of if (f := _object_finding(store, part, array, spec))]
    return _Checked(
        tuple(mark["objects"]), sum(o["bytes"] for o in mark["objects"].values()), tuple(findings)
    )


def _object_finding(store: Store, part: int, array: str, spec: ArraySpec) -> Finding | None:
    mark, name = store.mark(part, array), spec.object_path(part)
    committed = mark["objects"][name]
    try:
        size = store.place.size(name)
    except DamagedStoreError as error:
        return Finding("changed", name, str(error))
    if size is None:
        return Finding("missing", name, "committed, but not there")
    if size != committed["bytes"]:
        fault: Fault = "truncated" if size < committed["bytes"] else "changed"
        return Finding(fault, name, f"{size} bytes, committed were {committed['bytes']}")
    if digest_of(store.place.pieces(name)) != committed["xxh3_128"]:
        return Finding("changed", name, "its bytes differ from what was committed")
    length = committed_length(spec, array, int(mark["rows"]), store.ctx_len)
    try:
        values = store.read_object(array, spec, part, 0, length)
    except DamagedStoreError as error:
        return Finding("changed", name, str(error))
    if values_digest(values) != committed["values_xxh3_128"]:
        return Finding("changed", name, "decodes to other values than were committed")
    return None


def _metadata_findings(store: Store, known: set[str]) -> Iterator[Finding]:
    """Faults of `zarr.json` files; all arrays of a store span the same number of parts."""
    spans: dict[str, int] = {}
    for spec in _all_specs(store):
        try:
            spans[spec.metadata_path] = check_metadata(store.place, spec)
        except DamagedStoreError as error:
            yield Finding("changed", spec.metadata_path, str(error))
        for name, data in spec.metadata(1).items():
            if name not in known and name != spec.metadata_path:
                yield from _group_findings(store.place, name, data)
            known.add(name)
    usual = max(spans.values(), key=list(spans.values()).count, default=0)
    for name, span in spans.items():
        if span != usual:
            yield Finding(
                "changed", name, f"spans {span} parts, other arrays {usual}; collect again"
            )


def _all_specs(store: Store) -> Iterator[ArraySpec]:
    for array in store.arrays:
        try:
            width = int(store.mark(store.numbers(array)[0], array).get("width", 0))
        except DamagedStoreError:
            continue  # already found: its mark is damaged
        yield from specs(array, store.layout, width)


def _group_findings(place: Place, name: str, implied: bytes) -> Iterator[Finding]:
    try:
        found = None if place.size(name) is None else place.read(name)
    except DamagedStoreError as error:
        yield Finding("changed", name, str(error))
        return
    if found is None:
        yield Finding("missing", name, "group metadata")
    elif found != implied:
        yield Finding("changed", name, "group metadata differs from what Zarr writes")


def _incomplete_parts(store: Store) -> Iterator[Finding]:
    """Activations without the tokens or rows that say what they are."""
    for array in (name for name in store.arrays if name.startswith("acts/")):
        for needed in (TOKENS, SEQUENCE, POSITION):
            for part in sorted(set(store.numbers(array)) - set(store.numbers(needed))):
                yield Finding("missing", mark_path(part, needed), f"{array} has this part")


def _strays(place: Place, known: set[str]) -> Iterator[Finding]:
    """Objects that no mark vouches for."""
    for name in place.names():
        if place.is_link(name) and name not in known:
            yield Finding("foreign", name, "a symbolic link; never followed")
        elif is_temporary(name):
            yield Finding("leftover", name, "rest of an interrupted write; may be deleted")
        elif name not in known and not _is_mark(name):
            yield Finding(*_stray_kind(name))


def _is_mark(name: str) -> bool:
    return marked_array(PurePosixPath(name)) is not None


def _stray_kind(name: str) -> tuple[Fault, str, str]:
    if name.startswith(f"{GROUP}/"):
        return "uncommitted", name, "written but not committed; collect again commits it anew"
    return "foreign", name, "not part of a store"
