"""Repair a store: what is damaged is collected again, and nothing else is touched.

`verify` finds what is damaged. `zarr.json` files follow from the layout, rows from the seed, tokens
from the dataset, activations from the tokens and the model; or all come from another store. Parts
are repaired one after the other in this process, in the memory of a collection.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mpcache.config import RepairConfig
from mpcache.errors import DamagedStoreError
from mpcache.maintenance.findings import Finding
from mpcache.maintenance.metadata_check import all_specs, array_spans, usual_span
from mpcache.maintenance.original_collection import NoDatasetError
from mpcache.maintenance.other_store import OtherStore
from mpcache.maintenance.recompute import Recomputation
from mpcache.maintenance.repair_writer import PartRepair, RepairedMark
from mpcache.maintenance.verify import verify
from mpcache.parallel.config import ParallelConfig
from mpcache.storage.base import Storage, open_storage
from mpcache.store.object_paths import POSITION, SEQUENCE, TOKENS, is_claim
from mpcache.store.reader import Store, open_store


@dataclass(frozen=True, kw_only=True)
class RepairSummary:
    """What `repair` did."""

    store: str
    "path or URL of the store"
    marks: tuple[RepairedMark, ...]
    "the outcome for each mark that was damaged, or whose objects were damaged"
    metadata: tuple[str, ...]
    "zarr.json files that were written again"
    deleted: tuple[str, ...]
    "leftovers of interrupted writes that were deleted"
    left: tuple[Finding, ...]
    "findings that repair does not handle"

    @property
    def intact(self) -> bool:
        """Whether no committed data is damaged any more."""
        return all(mark.is_whole for mark in self.marks) and not any(
            finding.is_damage for finding in self.left
        )


def repair(
    store: str | Path | Storage,
    config: RepairConfig = RepairConfig(),  # noqa: B008  frozen
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
) -> RepairSummary:
    """Verify a store, and collect again what is damaged.

    Computed values are written only if they equal what was committed, unless the config accepts
    other bits. No journal of `verify` is used: what was intact then may be damaged by now.

    Args:
        store: Path, or `s3://` or `gs://` URL, of the store.
        config: Where the model, the dataset or a copy of the store is now, and what may be written.
        parallel: Threads and processes of the verification. The repair itself is one process.
        quiet: Without progress bars.

    Raises:
        UsageError: There is no store; or its model is needed and is not available.
        DamagedStoreError: `store.json` is damaged, which cannot be computed again.

    Example:
        ```python
        from mpcache import repair

        summary = repair("store")
        for mark in summary.marks:
            print(mark.outcome, mark.part, mark.array, mark.reason)
        assert summary.intact
        ```
    """
    storage = open_storage(store)
    opened = open_store(storage)
    findings = verify(storage, parallel, quiet=quiet).findings
    deleted = [f.path for f in findings if f.fault == "leftover" and config.delete_leftovers]
    # Claims first: a writer could still begin to publish a claim that lost its objects.
    deleted.sort(key=is_claim, reverse=True)
    for name in deleted:
        storage.delete(name)
    metadata = _restore_metadata(opened, [f.path for f in findings if f.fault == "metadata"])
    marks = _repair_marks(opened, _damaged_arrays(findings), config, quiet)
    handled = {*deleted, *metadata}
    return RepairSummary(
        store=str(storage),
        marks=marks,
        metadata=metadata,
        deleted=tuple(deleted),
        left=tuple(f for f in findings if f.mark is None and f.path not in handled),
    )


def _restore_metadata(store: Store, damaged: Sequence[str]) -> tuple[str, ...]:
    """Write the `zarr.json` files that the layout implies."""
    if not damaged:
        return ()
    committed = 1 + max(max(store.part_numbers(array)) for array in store.arrays)
    parts = max(committed, usual_span(array_spans(store)))
    implied: dict[str, bytes] = {}
    for _, spec in all_specs(store):
        implied |= spec.metadata(parts)
    for name in damaged:
        if not store.storage.create(name, implied[name]):
            store.storage.replace(name, implied[name])
    return tuple(damaged)


def _damaged_arrays(findings: Iterable[Finding]) -> dict[int, set[str]]:
    """Part -> its arrays whose mark or objects are damaged."""
    arrays: defaultdict[int, set[str]] = defaultdict(set)
    for finding in findings:
        if finding.mark is not None:
            part, array = finding.mark
            arrays[part].add(array)
    return dict(sorted(arrays.items()))


def _repair_marks(
    store: Store, damaged: dict[int, set[str]], config: RepairConfig, quiet: bool
) -> tuple[RepairedMark, ...]:
    marks = [(part, array) for part, arrays in damaged.items() for array in arrays]
    if not marks:
        return ()
    arrays = tuple(dict.fromkeys(sorted((array for _, array in marks), key=_dependency_order)))
    repairs = PartRepair(store, marks, config.accept_other_bits)
    source: Recomputation | OtherStore
    if config.source is None:
        source = Recomputation(store, config, arrays)
    else:
        source = OtherStore(store, config.source, arrays)
    try:
        for part in tqdm(damaged, "repair", unit="part", disable=quiet):
            for group in _groups(sorted(damaged[part], key=_dependency_order)):
                _repair_arrays(source, part, group, repairs)
    finally:
        source.close()
    return tuple(repairs.outcomes[mark] for mark in sorted(marks))


def _repair_arrays(
    source: Recomputation | OtherStore, part: int, arrays: Sequence[str], repairs: PartRepair
) -> None:
    try:
        source.write_part(part, arrays, repairs.writer)
    except (DamagedStoreError, NoDatasetError) as error:
        # What the repair needs is damaged too, a link, or missing. Other parts may need less.
        for array in arrays:
            if (part, array) not in repairs.outcomes:
                repairs.note(part, array, "left", str(error))


def _dependency_order(array: str) -> tuple[int, str]:
    """Rows need tokens, and activations need both."""
    return (TOKENS, SEQUENCE, POSITION).index(array) if not array.startswith("acts/") else 3, array


def _groups(arrays: Sequence[str]) -> list[list[str]]:
    """Arrays that are written together: all activations come from one forward pass."""
    acts = [array for array in arrays if array.startswith("acts/")]
    return [[array] for array in arrays if array not in acts] + ([acts] if acts else [])
