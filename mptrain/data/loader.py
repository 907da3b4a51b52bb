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
from mptrain.data.columns import (
    ASSISTANT,
    POSITION,
    SEQUENCE,
    TOKEN,
    Column,
    Columns,
    RowField,
    norm_of,
)
from mptrain.data.shuffle import Chunk
from mptrain.data.window_plans import (
    WHOLE_STREAM,
    StreamShare,
    WindowPlan,
    endless_plans,
    one_pass_plans,
)
from mptrain.data.windows import read_windows

# the rest of mptrain opens stores through this module: the one edge between the packages
__all__ = ["Batch", "Loader", "Split", "Store", "open_store"]

Split = Literal["train", "validation"]


class Loader:
    """Batches of one split of a store: the same rows on every side, shuffled and read ahead.

    The order of rows depends on `seed`, `window_rows`, the store's chunk_rows and the parts that
    are read, which are those that all sides have. The order does not depend on sides, row fields,
    batch_rows, threads or device.

    Host memory is at most (2 x window_rows + threads x chunk_rows + 3 x batch_rows) x row_bytes,
    where row_bytes is 8 for the position and for each row field, plus the values of the sides as
    stored; and 16 bytes for each row in the order of three windows. A window holds whole chunks, at
    least one. In addition, the positions and row fields of all rows that were read are kept, in 2
    to 8 bytes each, and batches for as long as they are in use.

    Close a loader, or use it in a `with` statement.

    Example:
        >>> from mpcache import open_store
        >>> from mptrain import Loader
        >>> side = ("layers.1.mlp", "output")
        >>> with Loader(open_store("store"), [side], "train", batch_rows=64) as loader:
        ...     shapes = [batch.values[side].shape for batch in loader.one_pass(128)]
        >>> shapes
        [torch.Size([64, 16]), torch.Size([64, 16])]

    Args:
        store: from `mpcache.open_store`.
        sides: pairs of a hookpoint and `input` or `output`.
        split: `train` or `validation`.
        batch_rows: rows in a batch.
        seed: seed of the order of `batches`.
        device: where batches are.
        window_rows: rows that are shuffled together; two windows are in memory.
        threads: threads that read; default one for each core, from 2 to 4, more for a bucket.
        row_fields: what else is read of each row, into `Batch.fields`.
        share: several loaders with a share each read their own chunks, and hand out their own
            rows of each of the endless batches; together these are the batches of one loader.

    Raises:
        UsageError: the split has no rows of these sides, or there are more readers than chunks in a
            window.
        DamagedStoreError: at the first batch that needs a window with a damaged chunk, or any chunk
            of a part whose positions or row fields are damaged.
    """

    def __init__(
        self,
        store: Store,
        sides: Sequence[Side],
        split: Split,
        *,
        batch_rows: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        window_rows: int = RunConfig.window_rows,
        threads: int | None = None,
        row_fields: Sequence[RowField] = (),
        share: StreamShare = WHOLE_STREAM,
    ) -> None:
        self.sides = tuple(dict.fromkeys(sides))
        self.batch_rows, self.seed, self.device = batch_rows, seed, torch.device(device)
        self.share = share
        self.chunk_rows = store.chunk_rows
        self.window = max(1, window_rows // store.chunk_rows)
        "chunks whose rows are shuffled together"
        _check_share(share, self.window, store.chunk_rows)
        self.parts = store.parts(self.sides, split)
        self.rows = sum(part.rows for part in self.parts)
        "rows in an epoch"
        if not self.rows:
            raise UsageError(
                f"{store.storage} has no {split} rows of {', '.join(map(':'.join, self.sides))}; "
                "collect more rows, or let the collection finish"
            )
        self.wait_seconds = 0.0
        "time that consumers have waited for batches"
        self.columns = _columns(store, self.sides, self.parts, row_fields)
        "what is read of each row"
        # asked before worker threads limit themselves to one core, because torch's count is global
        cores = torch.get_num_threads()
        self.threads = threads or max(min(4, max(2, cores)), store.storage.concurrency)
        "threads that read: more threads than cores only compete for Python's lock"
        one_core = partial(torch.set_num_threads, 1)
        self._readers = ThreadPoolExecutor(self.threads, "read", initializer=one_core)
        # runs one batch ahead: cuts the batch from a window and moves it to the device
        self._assembler = ThreadPoolExecutor(1, "assemble", initializer=one_core)

    @property
    def order_digest(self) -> str:
        """Digest of the order: loaders of one store with equal digests have equal batches."""
        parts = [(part.number, part.rows) for part in self.parts]
        plan = (self.seed, self.window, self.chunk_rows, parts)
        return hashlib.sha256(repr(plan).encode()).hexdigest()

    def batches(self, offset: int = 0) -> Iterator[Batch]:
        """Yield endless batches from row `offset` of the stream; each epoch has its own order."""
        plans = endless_plans(
            self._sizes, self.chunk_rows, seed=self.seed, window=self.window, offset=offset,
            share=self.share,
        )  # fmt: skip
        return self._ahead(self._cut(plans, offset))

    def one_pass(self, max_rows: int | None = None) -> Iterator[Batch]:
        """Yield each row once, or the first `max_rows` of them; the last batch may be shorter.

        Chunks are shuffled, so that the first rows come from many parts. The order is the same for
        all seeds, windows and batch sizes, so that runs are compared on the same rows.
        """
        rows = self.rows if max_rows is None else min(max_rows, self.rows)
        # windows no larger than a batch, so that few rows are read beyond those that are asked for
        window = min(self.window, -(-self.batch_rows // self.chunk_rows))
        plans = one_pass_plans(self._sizes, self.chunk_rows, window=window, rows=rows)
        return self._ahead(self._cut(plans, 0))

    def close(self) -> None:
        """Stop reading and end all threads; chunks that a thread has begun are still read."""
        self._readers.shutdown(wait=False, cancel_futures=True)  # the assembler waits for reads
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
        """Yield the same batches; each is made while the consumer works on the batch before."""
        pending = self._assembler.submit(next, batches, None)
        while True:
            started = time.perf_counter()
            batch = pending.result()
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            pending = self._assembler.submit(next, batches, None)
            yield batch


def _check_share(share: StreamShare, window: int, chunk_rows: int) -> None:
    """Check that every reader has a chunk of its own in each window."""
    if window < share.size:
        raise UsageError(
            f"a shuffle window needs at least one chunk for each of {share.size} processes, got "
            f"{window} chunks of {chunk_rows} rows; use --window-rows {share.size * chunk_rows} "
            "or a multiple of it"
        )


def _assistant(store: Store, part: int) -> Tensor:
    assistant_R = store.tokens.read_assistant(part)
    assert assistant_R is not None
    return assistant_R


def check_assistant_known(store: Store) -> None:
    """Check that the store says which tokens an assistant wrote.

    Raises:
        UsageError: it does not, because it was not made from chat messages.
    """
    if not store.has_assistant:
        raise UsageError(
            f"{store.storage} does not record which tokens an assistant wrote, because its "
            "dataset has "
            "no chat messages; use --only-tokens all, or collect a dataset of chat messages"
        )


def row_bytes(store: Store, sides: Sequence[Side]) -> int:
    """Return the bytes of a row's values on these sides, as the loader holds them."""
    return _dtype(store).itemsize * sum(store.width(*side) for side in sides)


def _dtype(store: Store) -> torch.dtype:
    dtype = getattr(torch, store.layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _columns(
    store: Store, sides: Sequence[Side], parts: Sequence[Part], row_fields: Sequence[RowField]
) -> Columns:
    def read_side(hookpoint: str, name: str) -> Callable[[Chunk, Tensor], object]:
        return lambda chunk, out: store.acts.read_chunk(
            hookpoint, name, parts[chunk.part].number, chunk.chunk, out
        )

    def field_column(
        read: Callable[..., Tensor], *side: str, dtype: torch.dtype = torch.int64
    ) -> Column:
        # read in whole parts: reading a few bytes per row by chunks would take as long as values
        @functools.cache
        def field_of_part(part: int) -> Tensor:
            return _compact(read(*side, parts[part].number))

        def copy(chunk: Chunk, out: Tensor) -> None:
            start = chunk.chunk * store.chunk_rows
            out.copy_(field_of_part(chunk.part)[start : start + chunk.rows])

        return Column(dtype, None, copy)

    if ASSISTANT in row_fields:
        check_assistant_known(store)
    known = {
        POSITION: field_column(store.tokens.read_positions),
        SEQUENCE: field_column(store.tokens.read_sequences),
        TOKEN: field_column(store.tokens.read_token_ids),
        ASSISTANT: field_column(partial(_assistant, store)),
    }
    for side in sides:
        known[norm_of(side)] = field_column(store.acts.read_norms, *side, dtype=torch.float32)
    columns: dict[Side | RowField, Column] = {name: known[name] for name in (POSITION, *row_fields)}
    for side in sides:
        columns[side] = Column(_dtype(store), store.width(*side), read_side(*side))
    return columns


def _compact(field_R: Shaped[Tensor, " R"]) -> Shaped[Tensor, " R"]:
    """Return the same numbers in the smallest type that holds them."""
    if field_R.is_floating_point():
        return field_R
    top = int(field_R.max())
    small = (dtype for dtype in (torch.int16, torch.int32) if top <= torch.iinfo(dtype).max)
    return field_R.to(next(small, torch.int64))
