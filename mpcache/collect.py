"""Fill a store, or what is missing of it: tokens first, then one forward pass a part.

While the model reads a part, the part before it is written, so that at most two parts of rows are
in memory: 2 x part_rows x (sum of widths) x bytes of a value, and one array's part read back.
"""

import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpcache.config import CollectConfig, split_of
from mpcache.documents import Documents, open_documents
from mpcache.format import (
    POSITION,
    SEQUENCE,
    TOKENS,
    acts,
    check_metadata,
    hookpoint_of,
    is_store,
    specs,
)
from mpcache.forward import Reading, capture_part
from mpcache.hooks import Capture, Side, resolve, widths
from mpcache.identity import identify, layout_of, open_place
from mpcache.inputs import find_separation
from mpcache.model import (
    load_model,
    model_digest,
    model_provenance,
    tokenizer_digest,
)
from mpcache.reader import Store, open_store
from mpcache.sketch import files_digest
from mpcache.tokenised import token_dtype
from mpcache.tokens import (
    FIRST_PARTS,
    Cursor,
    PartTokens,
    following,
    iter_parts,
    row_permutation,
    special_tokens,
)
from mpcache.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a collection did and what the store has now."""

    store: str
    parts: int
    "parts that hold all wanted hookpoints"
    rows: int
    exhausted: bool
    "the dataset ended before the rows wanted"
    forward_rows: int
    "rows that the model had to read"
    bytes: int
    "bytes of the wanted arrays on disk"
    nonfinite: int
    seconds: float
    "of forward passes and writing, without loading and tokenising"


def collect(config: CollectConfig, path: Path, *, quiet: bool = True) -> Summary:
    """Collect into a new store, or complete and extend the one there.

    Raises:
        ValueError: the user's mistake; nothing was written.
        OSError: disk or network; what was committed stays.
        KeyboardInterrupt: as it comes; what was committed stays.
    """
    model, tokenizer = load_model(config)
    documents = open_documents(config, tokenizer)
    return Collection(config, path, model, tokenizer, documents, quiet).run()


class Collection:
    """One collection with its model in memory; nothing is written before `run`."""

    def __init__(
        self,
        config: CollectConfig,
        path: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Documents,
        quiet: bool = True,
    ) -> None:
        self.config, self.path, self.quiet = config, path, quiet
        self.model, self.tokenizer, self.documents = model, tokenizer, documents
        self.sides = resolve(config.hookpoints, model)
        self.widths = widths(model, self.sides)
        self.layout = layout_of(config, token_dtype(tokenizer).name)
        self.reading = Reading(
            model,
            special_tokens(tokenizer, config),
            find_separation(model, config.cross_document_attention),
            config.batch_sequences,
        )
        self.identity = self.identify()
        self.writer = Writer(path, self.layout)
        self.bytes_written = 0
        # both splits want at least one part, whatever --rows says
        self.wanted_parts = max(2, -(-config.rows // config.part_rows))

    def run(self) -> Summary:
        """Write what is missing."""
        self.write_tokens()
        store = open_store(self.path)
        missing = {part: self.missing_sides(store, part) for part in self.parts(store)}
        started = time.monotonic()
        forward_rows = self.write_activations(store, {p: s for p, s in missing.items() if s})
        if forward_rows:  # another may have extended the store, or added arrays, meanwhile
            self.grow(open_store(self.path))
        return self.summary(forward_rows, time.monotonic() - started)

    def array(self, side: Side) -> str:
        return acts(side.hookpoint, side.side)

    def parts(self, store: Store) -> tuple[int, ...]:
        """Wanted parts that the dataset has."""
        return tuple(part for part in store.numbers(TOKENS) if part < self.wanted_parts)

    def missing_sides(self, store: Store, part: int) -> tuple[Side, ...]:
        return tuple(s for s in self.sides if part not in store.numbers(self.array(s)))

    def identify(self) -> dict[str, Any]:
        digests = {
            "model_digest": model_digest(self.model),
            "tokenizer_digest": tokenizer_digest(self.tokenizer),
            "dataset_digest": self.documents.digest,
        }
        return identify(self.config, digests, str(self.model.config._attn_implementation))

    def write_tokens(self) -> None:
        """Commit tokens and rows of all wanted parts that lack them."""
        store = None
        if is_store(self.path):
            self.open_place()
            store = open_store(self.path)
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
        # by its files a later collection below the same root knows the model without loading it
        files = None if is_store(self.path) else files_digest(self.config)
        provenance = {
            "model": {**model_provenance(self.model, self.config), "model_files": files},
            "dataset": self.documents.provenance,
        }
        open_place(self.path, self.config, self.identity, self.layout, provenance)

    def grow(self, store: Store | None) -> None:
        """Let all arrays span the same parts: those wanted, also arrays not asked for now.

        All at once and before any work, so that a stopped extension leaves no array behind.
        """
        there, arrays = 0, {TOKENS: 0, SEQUENCE: 0, POSITION: 0}
        if store and store.numbers(TOKENS):
            there = check_metadata(self.path, specs(TOKENS, self.layout)[0])
            acts_there = [array for array in store.arrays if array.startswith("acts/")]
            arrays |= {array: store.width(*hookpoint_of(array)) for array in acts_there}
        arrays |= {self.array(side): self.widths[side] for side in self.sides}
        for array, width in arrays.items():
            self.writer.grow(array, max(there, self.wanted_parts), width)

    def new_parts(self, store: Store | None) -> Iterator[PartTokens]:
        """Parts whose tokens are not committed, tokenised from where each split left off."""
        cursors = self.cursors(store) if store else FIRST_PARTS
        cursors = {part: cursor for part, cursor in cursors.items() if part < self.wanted_parts}
        if not cursors:
            return iter(())
        found = iter_parts(self.documents, self.tokenizer, self.config, cursors)
        # a count, not a condition: looking at one part more would tokenise it
        every = self.config.validation_every
        first = {split_of(part, every): part for part in cursors}
        count = sum(p >= first.get(split_of(p, every), p + 1) for p in range(self.wanted_parts))
        wanted = itertools.islice(found, count)
        return itertools.takewhile(lambda one: one.part < self.wanted_parts, wanted)

    def cursors(self, store: Store) -> dict[int, Cursor]:
        """First part of each split whose tokens or rows are missing, unless the split ended."""
        arrays = (TOKENS, SEQUENCE, POSITION)
        done = set.intersection(*(set(store.numbers(array)) for array in arrays))
        cursors = {}
        for part, cursor in FIRST_PARTS.items():
            while part in done:
                mark = store.mark(part, TOKENS)
                part, cursor = following(part, self.config.validation_every), mark["next_cursor"]
                if mark["last"]:
                    break
            else:
                cursors[part] = Cursor(*cursor)
        return cursors

    def commit_tokens(self, one: PartTokens) -> None:
        progress = {"cursor": list(one.cursor), "next_cursor": list(one.next_cursor)}
        self.writer.commit_tokens(one.part, one.tokens, {**progress, "last": one.last})
        self.writer.commit_rows(one.part, self.token_of_row(one.part, one.tokens.size))

    def token_of_row(self, part: int, rows: int) -> np.ndarray:
        return row_permutation(self.config.seed, part, rows)

    def write_activations(self, store: Store, missing: dict[int, tuple[Side, ...]]) -> int:
        """Run the model over parts and commit their missing sides; gives the rows it read."""
        rows = {part: int(store.mark(part, TOKENS)["rows"]) for part in missing}
        if not rows:
            return 0
        with self.bar("collect", sum(rows.values()), "row") as bar, Background() as background:
            for sides, parts in itertools.groupby(missing, key=missing.__getitem__):
                with Capture(self.model, sides) as capture:
                    for part in parts:
                        buffers = self.capture(capture, store, part, sides, bar)
                        background.submit(functools.partial(self.commit, part, buffers, bar))
        return sum(rows.values())

    def capture(
        self, capture: Capture, store: Store, part: int, sides: tuple[Side, ...], bar: "tqdm[Any]"
    ) -> dict[Side, Tensor]:
        tokens = store.read_tokens(part)
        dtype = getattr(torch, self.config.dtype)
        buffers = {s: torch.empty(tokens.size, self.widths[s], dtype=dtype) for s in sides}
        order = self.token_of_row(part, tokens.size)
        capture_part(capture, self.reading.batches(tokens), order, buffers, bar.update)
        return buffers

    def commit(self, part: int, buffers: dict[Side, Tensor], bar: "tqdm[Any]") -> None:
        """Commit the rows of a part; runs beside the next forward pass."""
        for side, x_RW in buffers.items():
            self.writer.commit_acts(part, self.array(side), x_RW)
        self.bytes_written += sum(x.numel() * x.element_size() for x in buffers.values())
        bar.set_postfix_str(f"{self.bytes_written / 1e9:.2f} GB committed", refresh=False)

    def bar(self, name: str, total: int, unit: str, idle: bool = False) -> "tqdm[Any]":
        hidden = self.quiet or idle
        return tqdm(total=total, desc=name, unit=unit, unit_scale=True, disable=hidden)

    def summary(self, forward_rows: int, seconds: float) -> Summary:
        store = open_store(self.path)
        arrays = [self.array(side) for side in self.sides]
        whole = [p for p in self.parts(store) if not self.missing_sides(store, p)]
        marks = [store.mark(part, array) for array in arrays for part in whole]
        return Summary(
            store=str(self.path),
            parts=len(whole),
            rows=sum(int(store.mark(part, TOKENS)["rows"]) for part in whole),
            exhausted=len(self.parts(store)) < self.wanted_parts,
            forward_rows=forward_rows,
            bytes=sum(o["bytes"] for mark in marks for o in mark["objects"].values()),
            nonfinite=sum(int(mark["nonfinite"]) for mark in marks),
            seconds=seconds,
        )


class Background:
    """Runs one piece of work at a time beside the caller: the bound on memory.

    Leaving waits for the work in hand, also when the model failed or Ctrl-C came: what was computed
    is not thrown away.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "commit", initializer=yield_to_others)
        self.pending: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Start the work when the one before is done; raises what that one raised."""
        self.wait()
        self.pending = self.pool.submit(work)

    def wait(self) -> None:
        """Until the work in hand is done; raises what it raised."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown(wait=True)
        if error is None:
            self.wait()


def yield_to_others() -> None:
    """Give the calling thread, and threads it starts, only the processor time that others leave.

    A forward pass that shares its cores with a writer waits for the slower of its threads at every
    operation. When the model waits for the writer, the writer has all cores.
    """
    torch.set_num_threads(1)  # of this thread: its pieces are small
    if sys.platform == "linux":  # elsewhere a priority is that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
