"""The store's side of a collection: create the store, write its tokens, check what was committed.

Nothing here assumes that this process works alone. All objects are created, never overwritten, and
what is missing is looked up in the store.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpcache.collection.jobs import Job, MissingPart
from mpcache.collection.producer import ModelFacts
from mpcache.collection.progress import Progress
from mpcache.collection.resize_arrays import equalize_spans, grow_arrays
from mpcache.collection.summary import CollectSummary, summarize
from mpcache.collection.token_stage import commit_tokens, missing_cursors, missing_parts
from mpcache.collection.wanted_parts import CollectionPlan, side_array
from mpcache.config import CollectConfig
from mpcache.data.documents import Documents
from mpcache.data.packing import FIRST_PARTS
from mpcache.data.tokenization import chat_template_identity, has_flags
from mpcache.data.vocabulary import Tokenizer, largest_token_id
from mpcache.parallel.config import CollectParallelConfig
from mpcache.storage.base import Storage, open_storage
from mpcache.store.fingerprint import create_or_check_store, identify, layout_of
from mpcache.store.object_paths import POSITION
from mpcache.store.reader import open_store
from mpcache.store.sealed_json import digest
from mpcache.store.store_metadata import is_store
from mpcache.store.writer import Writer, check_object_size

CollectParts = Callable[[Sequence[Job], Progress], tuple[MissingPart, ...]]
"reads and commits the parts of jobs; returns the parts that failed"


@dataclass(frozen=True, kw_only=True)
class WaitConfig:
    """How long a collection waits for what other processes write, in seconds."""

    for_tokens: float = 60.0
    "a share waits this long for the next part's tokens, which the first share writes"
    for_marks: float = 90.0
    "marks of other machines may become visible this late; NFS takes up to a minute"
    between_looks: float = 1.0
    "time between two looks at the store"


class Collection:
    """One collection into one store. Nothing is written before `run`.

    `template` is the chat template; None for documents that are no conversations.
    """

    def __init__(
        self,
        config: CollectConfig,
        where: str | Path | Storage,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        documents: Documents,
        template: str | None = None,
        *,
        parallel: CollectParallelConfig = CollectParallelConfig(),  # noqa: B008  frozen
        waits: WaitConfig = WaitConfig(),
        quiet: bool = True,
    ) -> None:
        self.config, self.facts, self.waits, self.quiet = config, facts, waits, quiet
        self.storage = open_storage(where)
        self.tokenizer, self.documents = tokenizer, documents
        flags = has_flags(documents, config)
        self.layout = layout_of(config, facts.token_dtype, token_flags=flags)
        self.plan = CollectionPlan(
            facts.sides, self.layout.parts_for(config.rows), parallel.part_share
        )
        self.template = template
        digests = {**facts.digests, "dataset_digest": documents.digest}
        self.identity = identify(
            config, digests | chat_template_identity(self.template), facts.attention
        )
        self.writer = Writer(self.storage, self.layout, digest(self.identity))

    def run(self, collect_parts: CollectParts) -> CollectSummary:
        """Write what is missing: tokens here, activations by `collect_parts`."""
        if self.plan.share.number > 1:
            self._await_tokens()
        self.write_tokens()
        jobs = self.plan.jobs(open_store(self.storage))
        start = time.monotonic()
        with Progress(jobs, self.quiet) as progress:
            missing = collect_parts(jobs, progress) if jobs else ()
        seconds = time.monotonic() - start
        failed = {part.part for part in missing}
        missing += self._invisible_parts(tuple(job for job in jobs if job.part not in failed))
        equalize_spans(self.writer)
        return summarize(
            open_store(self.storage),
            self.plan,
            self.config.rows,
            forward_rows=sum(job.rows for job in jobs),
            seconds=seconds,
            missing=missing,
        )

    def write_tokens(self) -> None:
        """Create or check the store, and commit tokens and row order of wanted parts without."""
        wanted = self.plan.parts_wanted
        store = None
        if is_store(self.storage):
            self._create_or_check_store()
            store = open_store(self.storage)
        cursors = missing_cursors(store, wanted) if store else dict(FIRST_PARTS)
        parts = missing_parts(
            cursors, wanted, self.config, self.documents, self.tokenizer, self.template
        )
        # The first parts show that a dataset is unusable, before the store is created.
        first = list(itertools.islice(parts, 2))
        self._create_or_check_store()
        widths = {side_array(side): width for side, width in self.facts.widths.items()}
        grow_arrays(self.writer, store, widths, wanted)
        total = wanted - (len(self.plan.parts(store)) if store else 0)
        with tqdm(
            total=total, desc="tokens", unit="part", unit_scale=True,
            disable=self.quiet or not first,
        ) as bar:  # fmt: skip
            for part in itertools.chain(first, parts):
                commit_tokens(self.writer, part, self.config.seed)
                bar.update()

    def _create_or_check_store(self) -> None:
        check_object_size(self.storage, self.layout, self.facts.widths.values())
        provenance: dict[str, Any] = {
            "model": {**self.facts.provenance, "model_files": self.facts.model_files},
            "dataset": self.documents.provenance,
            "tokenizer": {"special_ids": sorted(set(self.tokenizer.all_special_ids))},
        }
        if self.documents.kind != "tokens":  # a dataset of token ids may use all that the model has
            provenance["tokenizer"]["largest_id"] = largest_token_id(self.tokenizer)
        if self.template is not None:
            provenance["chat_template"] = self.template
        create_or_check_store(self.storage, self.config, self.identity, self.layout, provenance)

    def _await_tokens(self) -> None:
        """Leave tokens to the first share while it makes progress, or may still be starting."""
        committed, since = -1, time.monotonic()
        while time.monotonic() - since < self.waits.for_tokens:
            if is_store(self.storage):
                self._create_or_check_store()
                store = open_store(self.storage)
                if store.index.has_planned(self.plan.parts_wanted):
                    return
                if (count := len(store.part_numbers(POSITION))) != committed:
                    committed, since = count, time.monotonic()
            time.sleep(self.waits.between_looks)

    def _invisible_parts(self, jobs: tuple[Job, ...]) -> tuple[MissingPart, ...]:
        """Parts that are reported as committed, but whose marks this machine cannot see."""
        until = time.monotonic() + self.waits.for_marks
        while True:
            jobs = self.plan.uncommitted(open_store(self.storage), jobs)
            if not jobs or time.monotonic() > until:
                cause = (
                    f"its commit marks do not appear in {self.storage}; check that all machines "
                    "share this path"
                )
                return tuple(MissingPart(job.part, 1, cause) for job in jobs)
            time.sleep(self.waits.between_looks)
