"""Read a store's rows in shuffled order, ahead of the trainer, and hand them over in batches."""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from mpcache.errors import UsageError
from mpcache.store.reader import Part, Store, open_store
from mptrain.config.run import RunConfig
from mptrain.config.sides import Side
from mptrain.data.batches import Batch, cut_batches
from mptrain.data.shuffle import Chunk
from mptrain.data.windows import (
    ASSISTANT,
    POSITION,
    SEQUENCE,
    TOKEN,
    WHOLE_STREAM,
    Column,
    Columns,
    RowField,
    StreamShare,
    WindowPlan,
    endless_plans,
    norm_of,
    one_pass_plans,
    read_windows,
)

# the rest of mptrain opens stores through this module: the one edge between the packages
__all__ = ["Batch", "Loader", "Split", "Store", "open_store"]

Split = Literal["train", "validation"]


class Loader:
    """Batches of one split, the same rows on every side. Close it, or use it in a `with`.

    The order of rows depends on `seed`, `window_rows`, the store's chunk_rows and the parts that
    are read; not on the sides or facts, nor on batch_rows, threads or device.

    Host memory, at most: (2 x window_rows + threads x chunk_rows + 3 x batch_rows) x row_bytes,
    where row_bytes is 8 for the position, as much for each fact, and the sides' values as stored;
    and 16 bytes for each row in the order of three windows.
    A window holds whole chunks, and at least one. Who keeps batches keeps more. Of all rows of the
    parts that were read, the position and the facts are kept, in 2 to 8 bytes each.

    An error of the store surfaces as itself, at the first batch that needs a window with the
    damaged chunk, or with any chunk of a part whose positions or facts are damaged.
    """

    def __init__(
        self,
        store: Store,
        sides: Sequence[Side],
        split: Split,
        *,
        batch_rows: int,
        seed: int,
        device: torch.device,
        window_rows: int = RunConfig.window_rows,
        threads: int | None = None,
        facts: Sequence[RowField] = (),
        share: StreamShare = WHOLE_STREAM,
    ) -> None:
        """Read the parts that all sides have; `facts` are to be told of each row beside them.

        Of several loaders with a `share` each reads chunks of its own, and gives its rows of the
        endless batches: together they give what one alone would.
        """
        self.sides = tuple(dict.fromkeys(sides))
        self.batch_rows, self.seed, self.device = batch_rows, seed, device
        self.share = share
        self.chunk_rows = store.chunk_rows
        self.window = max(1, window_rows // store.chunk_rows)
        "chunks whose rows are mixed"
        if self.window < share.size:
            raise UsageError(
                f"each of {share.size} processes reads chunks of its own, got windows of "
                f"{self.window}; use window_rows {share.size * store.chunk_rows} or, so that "
                "shares are even, several times more"
            )
        self.parts = store.parts(self.sides, split)
        self.rows = sum(part.rows for part in self.parts)
        "rows in an epoch"
        if not self.rows:
            raise UsageError(
                f"{store.storage} has no {split} rows of {', '.join(map(':'.join, self.sides))}; "
                "collect more rows, or let the collection finish"
            )
        self.wait_seconds = 0.0
        "time that consumers spent waiting for batches"
        self.columns = _columns(store, self.sides, self.parts, facts)
        "what is read of each row, and how"
        # asked before a thread is told to use one core, else this one would be told so too
        computing = torch.get_num_threads()
        self.threads = threads or max(min(4, max(2, computing)), store.storage.concurrency)
        "threads that read: more than there are cores only take Python's lock from each other"
        alone = partial(torch.set_num_threads, 1)
        self._readers = ThreadPoolExecutor(self.threads, "read", initializer=alone)
        # runs one batch ahead: cuts it from a window and moves it to the device
        self._assembler = ThreadPoolExecutor(1, "assemble", initializer=alone)

    @property
    def order_digest(self) -> str:
        """Loaders with equal digests over one store give equal batches for equal offsets."""
        parts = [(part.number, part.rows) for part in self.parts]
        plan = (self.seed, self.window, self.chunk_rows, parts)
        return hashlib.sha256(repr(plan).encode()).hexdigest()

    def batches(self, offset: int = 0) -> Iterator[Batch]:
        """Endless batches from row `offset` of the stream; each epoch is shuffled differently."""
        plans = endless_plans(
            self._sizes, self.chunk_rows, seed=self.seed, window=self.window, offset=offset,
            share=self.share,
        )  # fmt: skip
        return self._ahead(self._cut(plans, offset))

    def one_pass(self, max_rows: int | None = None) -> Iterator[Batch]:
        """Each row once, or the first `max_rows` of them; the last batch may be shorter.

        Chunks are shuffled, so that the first rows come from many parts, and alike for all seeds,
        windows and batch sizes, so that runs are compared on the same rows.
        """
        rows = self.rows if max_rows is None else min(max_rows, self.rows)
        # windows no larger than a batch: little is read beyond the rows that are asked for
        window = min(self.window, -(-self.batch_rows // self.chunk_rows))
        plans = one_pass_plans(self._sizes, self.chunk_rows, window=window, rows=rows)
        return self._ahead(self._cut(plans, 0))

    def close(self) -> None:
        """Stop reading and end all threads; what a thread has begun, a few chunks, is read."""
        self._readers.shutdown(wait=False, cancel_futures=True)  # wakes the assembler
        self._assembler.shutdown(cancel_futures=True)
        self._readers.shutdown()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _sizes(self) -> list[int]:
        return [part.rows for part in self.parts]

    def _cut(self, plans: Iterator[WindowPlan], offset: int) -> Iterator[Batch]:
        windows = read_windows(plans, self.columns, self._readers)
        return cut_batches(windows, self.columns, self.batch_rows, offset, self.device)

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each made while the consumer works on the one before."""
        pending = self._assembler.submit(next, batches, None)
        while True:
            began = time.perf_counter()
            batch = pending.result()
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            pending = self._assembler.submit(next, batches, None)
            yield batch


def _assistant(store: Store, part: int) -> Tensor:
    assistant_R = store.tokens.read_assistant(part)
    assert assistant_R is not None
    return assistant_R


def refuse_without_assistant(store: Store) -> None:
    """Raise ValueError where the store does not say which tokens the assistant wrote."""
    if not store.has_assistant:
        raise UsageError(
            f"{store.storage} does not say which tokens an assistant wrote: it was not made from "
            "chat messages; use --only-tokens all, or collect a dataset of messages"
        )


def row_bytes(store: Store, sides: Sequence[Side]) -> int:
    """Bytes of a row's values on these sides, as they are held in memory."""
    return _dtype(store).itemsize * sum(store.width(*side) for side in sides)


def _dtype(store: Store) -> torch.dtype:
    dtype = getattr(torch, store.layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _columns(
    store: Store, sides: Sequence[Side], parts: Sequence[Part], facts: Sequence[RowField]
) -> Columns:
    def of_side(hookpoint: str, name: str) -> Callable[[Chunk, Tensor], object]:
        return lambda chunk, out: store.acts.read_chunk(
            hookpoint, name, parts[chunk.part].number, chunk.chunk, out
        )

    def of_row(read: Callable[..., Tensor], *of: str, dtype: torch.dtype = torch.int64) -> Column:
        # read by chunks, a few bytes a row would cost as much time as the values do
        @functools.cache
        def kept(part: int) -> Tensor:
            return _compact(read(*of, parts[part].number))

        def copy(chunk: Chunk, out: Tensor) -> None:
            start = chunk.chunk * store.chunk_rows
            out.copy_(kept(chunk.part)[start : start + chunk.rows])

        return Column(dtype, None, copy)

    known = {
        POSITION: of_row(store.tokens.read_positions),
        SEQUENCE: of_row(store.tokens.read_sequences),
        TOKEN: of_row(store.tokens.read_token_ids),
    }
    if ASSISTANT in facts:
        refuse_without_assistant(store)
        known[ASSISTANT] = of_row(partial(_assistant, store))
    for side in sides:
        known[norm_of(side)] = of_row(store.acts.read_norms, *side, dtype=torch.float32)
    columns: dict[Side | RowField, Column] = {fact: known[fact] for fact in (POSITION, *facts)}
    for side in sides:
        columns[side] = Column(_dtype(store), store.width(*side), of_side(*side))
    return columns


def _compact(fact_R: Shaped[Tensor, " R"]) -> Shaped[Tensor, " R"]:
    """The same numbers in as few bytes as will do."""
    if fact_R.is_floating_point():
        return fact_R
    top = int(fact_R.max())
    small = (dtype for dtype in (torch.int16, torch.int32) if top <= torch.iinfo(dtype).max)
    return fact_R.to(next(small, torch.int64))
