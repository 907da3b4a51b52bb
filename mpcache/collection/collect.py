"""Fill a store, or what is missing of it: tokens first, then one forward pass a part.

Whoever runs this makes the store and writes its tokens; parts are then read by the model in this
process, or by the workers of a Dask cluster. Nothing here trusts that nobody else does the same at
the same time: whatever is written is create-only, and what is missing is looked up, never assumed.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpcache.collection.jobs import Job, Missing, Progress
from mpcache.collection.producer import (
    ActivationProducer,
    Background,
    ModelFacts,
    commit_side,
    load,
    write_threads,
)
from mpcache.config import CollectConfig, split_of
from mpcache.data.documents import Documents, open_documents
from mpcache.data.packing import (
    FIRST_PARTS,
    Cursor,
    PartTokens,
    following,
    iter_parts,
    row_permutation,
    special_tokens,
)
from mpcache.data.token_file import Tokenizer, largest_id
from mpcache.data.tokenization import has_flags, template_digests, template_of
from mpcache.errors import UsageError
from mpcache.model.capture import part_input
from mpcache.model.file_snapshot import ModelFiles
from mpcache.model.hooks import Side
from mpcache.model.loading import load_tokenizer, tokenizer_digest
from mpcache.model.model_source import find_source
from mpcache.model.skeleton import load_vocabulary
from mpcache.parallel.config import CollectParallelConfig
from mpcache.storage.base import Storage, open_storage
from mpcache.store.array_metadata import check_metadata
from mpcache.store.description import is_store
from mpcache.store.fingerprint import create_or_check_store, identify, layout_of
from mpcache.store.format import POSITION, SEQUENCE, TOKENS, acts_array, array_specs, hookpoint_of
from mpcache.store.reader import Store, open_store
from mpcache.store.rows_wanted import extent_of
from mpcache.store.sealed_json import digest
from mpcache.store.writer import Writer, check_object_size

TOKEN_PATIENCE = 60.0  # seconds that a share waits for the next part's tokens from the first one
_LOOK_EVERY = 1.0
_SHOWN_WITHIN = 90.0  # NFS shows what another machine wrote after a minute at the latest

Work = Callable[[Sequence[Job], Progress], tuple[Missing, ...]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a collection did and what the store has now."""

    store: str
    parts: int
    "parts that hold all wanted hookpoints"
    rows: int
    rows_wanted: int
    "rows asked for"
    exhausted: bool
    "the dataset ended before the rows wanted"
    shortfall: str | None
    "why there are fewer rows than were wanted, over all shares"
    forward_rows: int
    "rows that the model had to read"
    bytes: int
    "bytes of the wanted arrays on disk"
    nonfinite: int
    seconds: float
    "of forward passes and writing, without loading and tokenising"
    share: str = "1/1"
    "the share that parts, rows and bytes are counted in"
    missing: tuple[Missing, ...] = ()
    "wanted parts that could not be collected"
    empty_documents: int | None = None
    "documents without tokens that all wanted parts left out; None: such are kept"


def collect(
    config: CollectConfig,
    where: str | Path | Storage,
    parallel: CollectParallelConfig = CollectParallelConfig(),  # noqa: B008  frozen
    *,
    quiet: bool = True,
) -> Summary:
    """Collect into a new store, or complete and extend the one there.

    Raises:
        ValueError: the user's mistake; nothing was written.
        OSError: disk or network; what was committed stays.
        KeyboardInterrupt: as it comes; what was committed stays.
    """
    place = open_storage(where)
    if parallel.is_wanted:
        return _collect_with_workers(config, place, parallel, quiet)
    files = ModelFiles.of(find_source(config))
    tokenizer = load_tokenizer(config, files.source)
    documents = _checked_documents(config, tokenizer)
    loaded = load(config, tokenizer, files)
    station = ActivationProducer(config, loaded)
    # by its files a later collection below the same root knows the model without loading it
    named = None if is_store(place) else loaded.files_digest()
    facts = dataclasses.replace(station.facts, model_files=named)
    collection = Collection(config, place, facts, loaded.tokenizer, documents, parallel, quiet)
    return collection.run(functools.partial(work_here, station, place))


def _checked_documents(config: CollectConfig, tokenizer: Tokenizer) -> Documents:
    """Before the weights, which take long: what is wrong with the dataset, with the chat template
    or with the special tokens asked for is said at once.
    """
    documents = open_documents(config, load_vocabulary(config, tokenizer))
    template_of(documents, tokenizer, config)
    special_tokens(tokenizer, config)
    return documents


def _collect_with_workers(
    config: CollectConfig, place: Storage, parallel: CollectParallelConfig, quiet: bool
) -> Summary:
    from mpcache.collection.dask_client import (
        DaskCollector,  # brings Dask's scheduler, which one process does not need
    )

    tokenizer = load_tokenizer(config)
    documents = _checked_documents(config, tokenizer)
    with DaskCollector(parallel, config, place, quiet=quiet) as crew:
        facts = crew.facts()
        _refuse_other_tokenizer(tokenizer, facts)
        collection = Collection(config, place, facts, tokenizer, documents, parallel, quiet)
        return collection.run(crew.work)


def _refuse_other_tokenizer(tokenizer: Tokenizer, facts: ModelFacts) -> None:
    """Tokens are made here, and the store names the tokenizer of the workers."""
    if tokenizer_digest(tokenizer) != facts.digests.get("tokenizer_digest"):
        raise UsageError(
            "all machines must have the same tokenizer, got another one on a worker; copy the "
            "model's folder there, and give the same command again"
        )


def work_here(
    station: ActivationProducer,
    where: str | Path | Storage,
    jobs: Sequence[Job],
    progress: Progress,
) -> tuple[Missing, ...]:
    """Read and commit parts in this process; the first failure ends it."""
    store = open_store(where)
    writer = Writer(store.storage, store.layout, store.fingerprint)

    def commit(part: int, side: Side, x_RW: Any) -> None:
        progress.committed(commit_side(writer, part, side, x_RW))

    try:
        with Background(write_threads(station.config, store.storage)) as background:
            for job in jobs:
                tokens = part_input(store, job.part)
                buffers = station.read(job.part, tokens, job.sides, progress.reader(job.part))
                works = [functools.partial(commit, job.part, *one) for one in buffers.items()]
                del buffers  # an array's memory is free as soon as it is written
                background.submit(works)
                del works
    finally:
        station.close()
    return ()


class Collection:
    """The store's half of a collection; nothing is written before `run`."""

    def __init__(
        self,
        config: CollectConfig,
        where: str | Path | Storage,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        documents: Documents,
        parallel: CollectParallelConfig = CollectParallelConfig(),  # noqa: B008  frozen
        quiet: bool = True,
    ) -> None:
        self.config, self.facts, self.quiet = config, facts, quiet
        self.storage = open_storage(where)
        self.tokenizer, self.documents, self.share = tokenizer, documents, parallel.parts
        self.sides = facts.sides
        flags = has_flags(documents, config)
        self.layout = layout_of(config, facts.token_dtype, token_flags=flags)
        digests = {**facts.digests, "dataset_digest": documents.digest}
        self.template = template_of(documents, tokenizer, config)
        digests |= template_digests(self.template)
        self.identity = identify(config, digests, facts.attention)
        self.writer = Writer(self.storage, self.layout, digest(self.identity))
        self.wanted_parts = self.layout.parts_for(config.rows)

    def run(self, work: Work) -> Summary:
        """Write what is missing; `work` does the parts."""
        if self.share.number > 1:
            self.await_tokens()
        self.write_tokens()
        jobs = self.jobs(open_store(self.storage))
        started = time.monotonic()
        with Progress(jobs, self.quiet) as progress:
            missing = work(jobs, progress) if jobs else ()
        seconds = time.monotonic() - started
        missing += self.unseen([job for job in jobs if job.part not in {m.part for m in missing}])
        self.settle()
        return self.summary(sum(job.rows for job in jobs), seconds, missing)

    def jobs(self, store: Store) -> tuple[Job, ...]:
        """What the parts of this share lack, in order."""
        found = ((part, self.missing_sides(store, part)) for part in self.share_of(store))
        return tuple(
            Job(part, store.mark(part, TOKENS).rows, sides) for part, sides in found if sides
        )

    def array(self, side: Side) -> str:
        return acts_array(side.hookpoint, side.side)

    def parts(self, store: Store) -> tuple[int, ...]:
        """Wanted parts that the dataset has."""
        return tuple(part for part in store.part_numbers(TOKENS) if part < self.wanted_parts)

    def share_of(self, store: Store) -> tuple[int, ...]:
        return tuple(part for part in self.parts(store) if self.share.has(part))

    def missing_sides(self, store: Store, part: int) -> tuple[Side, ...]:
        return tuple(s for s in self.sides if part not in store.part_numbers(self.array(s)))

    def await_tokens(self) -> None:
        """Leave tokens to the first share for as long as it makes progress, or may be starting."""
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < TOKEN_PATIENCE:
            if is_store(self.storage):
                self.open_place()
                store = open_store(self.storage)
                if not self.cursors(store):
                    return
                if (count := len(store.part_numbers(POSITION))) != seen:
                    seen, since = count, time.monotonic()
            time.sleep(_LOOK_EVERY)

    def write_tokens(self) -> None:
        """Commit tokens and rows of all wanted parts that lack them."""
        store = None
        if is_store(self.storage):
            self.open_place()
            store = open_store(self.storage)
        parts = self.new_parts(store)
        # an unusable dataset shows in its first parts: before the store is made
        ahead = list(itertools.islice(parts, 2))
        self.open_place()
        self.grow(store)
        todo = self.wanted_parts - (len(self.parts(store)) if store else 0)
        with self.bar("tokens", todo, "part", not ahead) as bar:
            for one in itertools.chain(ahead, parts):
                self.commit_tokens(one)
                bar.update()

    def open_place(self) -> None:
        check_object_size(self.storage, self.layout, self.facts.widths.values())
        provenance: dict[str, Any] = {
            "model": {**self.facts.provenance, "model_files": self.facts.model_files},
            "dataset": self.documents.provenance,
            "tokenizer": {"special_ids": sorted(set(self.tokenizer.all_special_ids))},
        }
        if self.documents.kind != "tokens":  # token ids may be any that the model has
            provenance["tokenizer"]["largest_id"] = largest_id(self.tokenizer)
        if self.template is not None:
            provenance["chat_template"] = self.template
        create_or_check_store(self.storage, self.config, self.identity, self.layout, provenance)

    def grow(self, store: Store | None) -> None:
        """Let all arrays span the same parts: those wanted, also arrays not asked for now.

        All at once and before any work, so that a stopped extension leaves no array behind.
        """
        there, arrays = 0, {TOKENS: 0, SEQUENCE: 0, POSITION: 0}
        if store and store.part_numbers(TOKENS):
            there = check_metadata(self.storage, array_specs(TOKENS, self.layout)[0])
            acts_there = [array for array in store.arrays if array.startswith("acts/")]
            arrays |= {array: store.width(*hookpoint_of(array)) for array in acts_there}
        arrays |= {self.array(side): width for side, width in self.facts.widths.items()}
        for array, width in arrays.items():
            self.writer.grow(array, max(there, self.wanted_parts), width)

    def new_parts(self, store: Store | None) -> Iterator[PartTokens]:
        """Parts whose tokens are not committed, tokenised from where each split left off."""
        cursors = self.cursors(store) if store else dict(FIRST_PARTS)
        if not cursors:
            return iter(())
        found = iter_parts(self.documents, self.tokenizer, self.config, cursors, self.template)
        # a count, not a condition: looking at one part more would tokenise it
        every = self.config.validation_every
        first = {split_of(part, every): part for part in cursors}
        count = sum(p >= first.get(split_of(p, every), p + 1) for p in range(self.wanted_parts))
        wanted = itertools.islice(found, count)
        return itertools.takewhile(lambda one: one.part < self.wanted_parts, wanted)

    def cursors(self, store: Store) -> dict[int, Cursor]:
        """First wanted part of each split whose tokens or rows are missing."""
        arrays = (TOKENS, SEQUENCE, POSITION)
        done = set.intersection(*(set(store.part_numbers(array)) for array in arrays))
        cursors = {}
        for part, cursor in FIRST_PARTS.items():
            while part in done:
                progress = store.index.token_progress(part)
                part = following(part, self.config.validation_every)
                cursor = Cursor(*progress.next_cursor)
                if progress.last:
                    break
            else:
                if part < self.wanted_parts:
                    cursors[part] = cursor
        return cursors

    def commit_tokens(self, one: PartTokens) -> None:
        self.writer.commit_tokens(one.part, one.tokens, one.flags, one.progress, one.rows)
        order = row_permutation(self.config.seed, one.part, one.rows)
        self.writer.commit_rows(one.part, order)

    def settle(self) -> None:
        """Let all arrays span the same parts again.

        Another collection may have grown the arrays that it saw when it began, not those that this
        one made since; and of two that grow the same array at once, the smaller may come last.
        """
        while True:
            store = open_store(self.storage)
            widths = {array: self.width(store, array) for array in store.arrays}
            spans = {array: self.span(array, width) for array, width in widths.items()}
            longest = max(high for _, high in spans.values())
            short = [array for array, (low, _) in spans.items() if low < longest]
            for array in short:
                self.writer.grow(array, longest, widths[array])
            if not short:
                return

    def width(self, store: Store, array: str) -> int:
        return store.width(*hookpoint_of(array)) if array.startswith("acts/") else 0

    def span(self, array: str, width: int) -> tuple[int, int]:
        """Fewest and most parts of the Zarr arrays under one mark."""
        found = [
            check_metadata(self.storage, spec) for spec in array_specs(array, self.layout, width)
        ]
        return min(found), max(found)

    def unseen(self, jobs: Sequence[Job]) -> tuple[Missing, ...]:
        """Jobs that are said to be done and of which no marks can be seen from here."""
        until = time.monotonic() + _SHOWN_WITHIN
        while True:
            store = open_store(self.storage)
            jobs = [j for j in jobs if set(j.sides) & set(self.missing_sides(store, j.part))]
            if not jobs or time.monotonic() > until:
                cause = f"its marks cannot be seen in {self.storage}; do all machines share it?"
                return tuple(Missing(job.part, 1, cause) for job in jobs)
            time.sleep(_LOOK_EVERY)

    def bar(self, name: str, total: int, unit: str, idle: bool = False) -> "tqdm[Any]":
        hidden = self.quiet or idle
        return tqdm(total=total, desc=name, unit=unit, unit_scale=True, disable=hidden)

    def summary(self, forward_rows: int, seconds: float, missing: tuple[Missing, ...]) -> Summary:
        store = open_store(self.storage)
        arrays = [self.array(side) for side in self.sides]
        whole = [p for p in self.share_of(store) if not self.missing_sides(store, p)]
        marks = [mark for array in arrays for mark in store.marks(array, whole)]
        extent = extent_of(store, self.config.rows)
        return Summary(
            store=str(self.storage),
            parts=len(whole),
            rows=sum(store.mark(part, TOKENS).rows for part in whole),
            rows_wanted=extent.rows_wanted,
            exhausted=extent.exhausted,
            shortfall=extent.shortfall,
            forward_rows=forward_rows,
            bytes=sum(mark.stored_bytes for mark in marks),
            nonfinite=sum(mark.nonfinite for mark in marks),
            seconds=seconds,
            share=str(self.share),
            missing=missing,
            empty_documents=store.tokens.empty_documents(self.parts(store)),
        )
