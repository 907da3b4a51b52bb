"""Mend a store: what is damaged is collected once more, and nothing else is touched.

`verify` says what is damaged. `zarr.json` files follow from the layout; rows from the seed; tokens
from the dataset; activations from the tokens and the model; or all of these from another store.
Parts are mended one after the other in this process; memory: that of a collection.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mpcache.config import RepairConfig
from mpcache.errors import DamagedStoreError, UsageError
from mpcache.maintenance.convert import give_converted
from mpcache.maintenance.copy import copy_part
from mpcache.maintenance.findings import Finding
from mpcache.maintenance.recompute import NoDatasetError, Recomputation
from mpcache.maintenance.repair_writer import PartRepair, RepairedMark
from mpcache.maintenance.repartition import Repartition
from mpcache.maintenance.verify import all_specs, spans, usual_span, verify
from mpcache.parallel.config import ParallelConfig
from mpcache.storage.base import Storage, open_storage
from mpcache.store.format import POSITION, SEQUENCE, TOKENS, is_claim
from mpcache.store.reader import Store, open_store
from mpcache.store.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What `repair` did."""

    store: str
    marks: tuple[RepairedMark, ...]
    "what became of each mark that was damaged, or whose objects were"
    metadata: tuple[str, ...]
    "zarr.json files that were written anew"
    deleted: tuple[str, ...]
    "rests of interrupted writes"
    left: tuple[Finding, ...]
    "what was found and is no work for repair"

    @property
    def intact(self) -> bool:
        """Whether committed data is whole now."""
        return all(one.is_whole for one in self.marks) and not any(f.damaging for f in self.left)


def repair(
    where: str | Path | Storage,
    config: RepairConfig = RepairConfig(),  # noqa: B008  frozen
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
) -> Repaired:
    """Verify a store, in parallel as asked, and mend what is found.

    No journal of `verify` is believed: what was sound then may be damaged by now.

    Raises:
        ValueError: there is no store; or its model is needed and another one was found.
        DamagedStoreError: `store.json` is damaged, which nothing else tells.
    """
    place = open_storage(where)
    store = open_store(place)
    findings = verify(place, parallel, quiet=quiet).findings
    deleted = [f.path for f in findings if f.fault == "leftover" and config.delete_leftovers]
    deleted.sort(key=is_claim, reverse=True)  # one that lost its objects might still be begun with
    for name in deleted:
        place.delete(name)
    metadata = _mend_metadata(store, [f.path for f in findings if f.fault == "metadata"])
    marks = _mend_marks(store, _damaged(findings), config, quiet)
    done = {*deleted, *metadata}
    left = [f for f in findings if f.mark is None and f.path not in done]
    return Repaired(
        store=str(place), marks=marks, metadata=metadata, deleted=tuple(deleted), left=tuple(left)
    )


def _mend_metadata(store: Store, damaged: Sequence[str]) -> tuple[str, ...]:
    """Write the `zarr.json` files that the layout implies."""
    if not damaged:
        return ()
    marked = 1 + max(max(store.part_numbers(array)) for array in store.arrays)
    parts = max(marked, usual_span(spans(store)))
    implied: dict[str, bytes] = {}
    for _, spec in all_specs(store):
        implied |= spec.metadata(parts)
    for name in damaged:
        if not store.storage.create(name, implied[name]):
            store.storage.replace(name, implied[name])
    return tuple(damaged)


def _damaged(findings: Iterable[Finding]) -> dict[int, set[str]]:
    """Arrays whose mark or objects are damaged, by part."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for finding in findings:
        if finding.mark is not None:
            part, array = finding.mark
            found[part].add(array)
    return dict(sorted(found.items()))


class _OtherStore:
    """A copy of a store, or the store that it was converted from."""

    def __init__(self, store: Store, where: str, arrays: Sequence[str]) -> None:
        self.source = open_store(where)
        if self.source.fingerprint != store.fingerprint:
            raise UsageError(
                f"{where} must hold the same rows as {store.storage}, got others; "
                "name a copy of it, or the store it was converted from"
            )
        if lacking := [array for array in arrays if array not in self.source.arrays]:
            raise UsageError(f"{where} lacks {lacking[0]}; name another copy, or none")
        self.cut = Repartition(self.source, store.layout, arrays)

    def give(self, part: int, arrays: Sequence[str], writer: Writer) -> None:
        for array in arrays:
            if self.cut.is_copy(array):
                copy_part(self.source, writer, (part, array))
            else:
                give_converted(self.cut, writer, part, array)

    def close(self) -> None:
        """Nothing of it stays open."""


def _mend_marks(
    store: Store, damaged: dict[int, set[str]], config: RepairConfig, quiet: bool
) -> tuple[RepairedMark, ...]:
    pairs = [(part, array) for part, arrays in damaged.items() for array in arrays]
    arrays = tuple(dict.fromkeys(sorted((array for _, array in pairs), key=_rank)))
    if not pairs:
        return ()
    repairs = PartRepair(store, pairs, config.accept_other_bits)
    source: Recomputation | _OtherStore
    if config.source is None:
        source = Recomputation(store, config, arrays)
    else:
        source = _OtherStore(store, config.source, arrays)
    try:
        for part in tqdm(damaged, "repair", unit="part", disable=quiet):
            # tokens tell of rows, and both of activations
            for group in _groups(sorted(damaged[part], key=_rank)):
                _give(source, part, group, repairs)
    finally:
        source.close()
    return tuple(repairs.outcomes[pair] for pair in sorted(pairs))


def _give(
    source: Recomputation | _OtherStore, part: int, arrays: Sequence[str], repairs: PartRepair
) -> None:
    try:
        source.give(part, arrays, repairs.writer)
    except (DamagedStoreError, NoDatasetError) as error:
        # what is needed for it is damaged too, or a link, or gone; other parts may need less
        for array in arrays:
            if (part, array) not in repairs.outcomes:
                repairs.note(part, array, "left", str(error))


def _rank(array: str) -> tuple[int, str]:
    return (TOKENS, SEQUENCE, POSITION).index(array) if not array.startswith("acts/") else 3, array


def _groups(arrays: Sequence[str]) -> list[list[str]]:
    """Arrays that are given at once: those of one forward pass."""
    sides = [array for array in arrays if array.startswith("acts/")]
    return [[array] for array in arrays if array not in sides] + ([sides] if sides else [])
