"""Check every byte of a store against its marks, and its marks against themselves.

Memory for each part in work at the same time: 24 MB, or three chunks if these are larger; and for
each mark a few hundred bytes. The size of parts does not matter.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mpcache.errors import DamagedStoreError
from mpcache.maintenance.findings import Finding
from mpcache.maintenance.mark_check import MarkToCheck, check_mark_and_objects
from mpcache.maintenance.metadata_check import check_all_metadata
from mpcache.maintenance.stray_objects import find_strays
from mpcache.maintenance.verify_journal import Journal
from mpcache.parallel.config import ParallelConfig
from mpcache.parallel.ordered_map import ordered_map
from mpcache.storage.base import Storage, open_storage
from mpcache.store.object_paths import MARKS, POSITION, SEQUENCE, STORE_FILE, TOKENS, mark_path
from mpcache.store.reader import Store, open_store


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`."""

    marks: int = 0
    objects: int = 0
    bytes: int = 0
    "of objects that were read"
    earlier: int = 0
    "marks that were intact earlier, by the journal; of their objects only the size was checked"
    findings: tuple[Finding, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether no committed data is damaged."""
        return not any(finding.is_damage for finding in self.findings)


def verify(
    store: str | Path | Storage,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008  frozen
    *,
    journal: str | Path | None = None,
    quiet: bool = True,
) -> Verdict:
    """Check every byte of a store. Nothing is changed.

    Args:
        store: Path, or `s3://` or `gs://` URL, of the store.
        parallel: Threads and processes that check parts. They do not change the result.
        journal: File that records which marks are intact. The next call with the same file checks
            only the existence and the size of their objects, so an interrupted call can continue.
        quiet: Without a progress bar.

    Raises:
        UsageError: There is no store, or its format version is unknown; or the journal belongs to
            another store.
        OSError: The disk or the network failed.

    Example:
        ```python
        from mpcache import verify

        verdict = verify("store")
        for finding in verdict.findings:
            print(finding.fault, finding.path, finding.remedy)
        assert verdict.intact
        ```
    """
    storage = open_storage(store)
    try:
        opened = open_store(storage)
    except DamagedStoreError as error:
        return Verdict(findings=(Finding("settings", STORE_FILE, str(error)),))
    try:
        marks = [(part, array) for array in opened.arrays for part in opened.part_numbers(array)]
    except DamagedStoreError as error:
        return Verdict(findings=(Finding("linked", MARKS, str(error)),))
    records = None if journal is None else Journal(Path(journal), storage.address, opened.digest)
    checked = _check_marks(opened, marks, parallel, records, quiet)
    findings = (
        *checked.findings,
        *check_all_metadata(opened),
        *_incomplete_parts(opened),
        *find_strays(opened),
    )
    return Verdict(len(marks), checked.objects, checked.bytes, checked.earlier, findings)


def _check_marks(
    store: Store,
    marks: Sequence[tuple[int, str]],
    parallel: ParallelConfig,
    journal: Journal | None,
    quiet: bool,
) -> Verdict:
    names = [mark_path(*mark) for mark in marks]
    known = [None if journal is None else journal.intact_digest(name) for name in names]
    tasks = [MarkToCheck(*mark, digest) for mark, digest in zip(marks, known, strict=True)]
    check = functools.partial(check_mark_and_objects, store)
    checks = ordered_map(check, tasks, parallel, quiet=quiet)
    objects = size = earlier = 0
    findings: list[Finding] = []
    with tqdm(checks, "verify", len(marks), unit="mark", disable=quiet) as bar:
        for name, checked in zip(names, bar, strict=True):
            objects, size = objects + checked.objects, size + checked.bytes
            earlier += checked.was_intact
            findings += checked.findings
            if journal is not None and not checked.was_intact:
                journal.add(name, checked.digest, checked.findings)
    return Verdict(len(marks), objects, size, earlier, tuple(findings))


def _incomplete_parts(store: Store) -> Iterator[Finding]:
    """Activations without the tokens or rows that say what they belong to."""
    needed = {array: set(store.part_numbers(array)) for array in (TOKENS, SEQUENCE, POSITION)}
    for array in (name for name in store.arrays if name.startswith("acts/")):
        for other, parts in needed.items():
            for part in sorted(set(store.part_numbers(array)) - parts):
                name = mark_path(part, other)
                yield Finding(
                    "missing", name, f"{array} has part {part}, but {other} lacks it", (part, other)
                )
