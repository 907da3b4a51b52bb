"""Where the model stands: it is loaded once in a process and reads parts there, one at a time.

While it reads a part, the part before it is written, so that at most two parts of rows are in
memory: 2 x part_rows x (sum of widths) x bytes of a value. A short part, the last of a split, takes
one array's whole part more for each thread that writes. From a GPU come two batches on their way:
2 x batch_sequences x ctx_len x (sum of widths) x bytes of a value, page-locked.

Shapes: R rows of a part, W width, S sequences, L tokens in a sequence.
"""

import concurrent.futures
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.data.packing import row_permutation, special_tokens
from mpcache.data.token_file import Tokenizer, token_dtype
from mpcache.model.capture import PartInput, Reading, capture_part
from mpcache.model.compile import Compiled
from mpcache.model.document_separation import find_separation
from mpcache.model.file_snapshot import ModelFiles
from mpcache.model.hooks import Capture, Side, resolve, widths
from mpcache.model.loading import load_model, model_digest, model_provenance, tokenizer_digest
from mpcache.model.model_source import find_source
from mpcache.model.offload import Transfer
from mpcache.storage.base import Storage
from mpcache.store.format import acts_array
from mpcache.store.writer import Writer

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a store has to know of the model that fills it; plain values, the same everywhere."""

    digests: Mapping[str, str]
    "of model and tokenizer"
    attention: str
    token_dtype: str
    widths: Mapping[Side, int]
    "of the wanted sides, in the model's order"
    provenance: Mapping[str, str | None]
    model_files: str | None = None
    "digest of the files that the model was loaded from, where a new store needs it"

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(self.widths)


@dataclass(frozen=True)
class Loaded:
    """A model in memory, its tokenizer and their digests, which take time with large models."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    digests: Mapping[str, str]
    files: ModelFiles
    "what the model was loaded from"
    has_code: bool
    "code that came with the model was run, and may have read anything"

    def files_digest(self) -> str | None:
        """Raises ValueError where the files are no longer those that were loaded."""
        return None if self.has_code else self.files.digest()


def load(
    config: CollectConfig, tokenizer: Tokenizer | None = None, files: ModelFiles | None = None
) -> Loaded:
    """Load the model; `tokenizer` is what was loaded of `files` before, if it was.

    Raises ValueError where the user can help it, ConnectionError without the Hub.
    """
    files = files or ModelFiles.of(find_source(config))  # before anything is loaded
    model, tokenizer = load_model(config, source=files.source, tokenizer=tokenizer)
    files.check_unchanged()
    digests = {"model_digest": model_digest(model)}
    if (own := tokenizer_digest(tokenizer)) is not None:  # a model without a tokenizer has no key
        digests["tokenizer_digest"] = own
    return Loaded(model, tokenizer, digests, files, config.trust_remote_code)


class ActivationProducer:
    """A loaded model and how a collection uses it. Its calls of the model must not overlap."""

    def __init__(self, config: CollectConfig, loaded: Loaded) -> None:
        self.config, self.model = config, loaded.model
        self.sides = resolve(config.hookpoints, self.model)
        self.widths = widths(self.model, self.sides)
        self.reading = Reading(
            self.model,
            special_tokens(loaded.tokenizer, config),
            find_separation(self.model, config, self.sides),
            config.batch_sequences,
        )
        self.facts = ModelFacts(
            digests=loaded.digests,
            attention=str(self.model.config._attn_implementation),
            token_dtype=token_dtype(loaded.tokenizer).name,
            widths={side: self.widths[side] for side in self.sides},
            provenance=model_provenance(self.model, loaded.files.source),
        )
        on_gpu = self.model.device.type == "cuda"
        self._copy = Transfer(self.model.device).start if on_gpu else None
        self._compiled = Compiled(self.model, self.sides) if config.compile else None
        self._hooks = ExitStack()
        self._capture: Capture | None = None

    def read(
        self,
        part: int,
        tokens: PartInput,
        sides: tuple[Side, ...],
        advance: Callable[[int], object],
    ) -> dict[Side, Tensor]:
        """The rows `[R, W]` of a part in the storage dtype; `advance` gets the count of a batch."""
        rows = tokens.tokens_SL.size if tokens.rows is None else tokens.rows
        dtype = getattr(torch, self.config.dtype)
        buffers = {side: empty_rows(rows, self.widths[side], dtype) for side in sides}
        order_R = row_permutation(self.config.seed, part, rows)
        batches = self.reading.batches(*tokens)
        capture = self._capturing(sides)
        with self.computing():
            capture_part(capture, batches, order_R, buffers, advance, self._copy)
        return buffers

    def computing(self) -> AbstractContextManager[None]:
        """The model as it reads: compiled, where that is asked for. Probes are not worth it."""
        return self._compiled.used() if self._compiled else nullcontext()

    def _capturing(self, sides: tuple[Side, ...]) -> Capture:
        """Hooks stay on the model from part to part: putting them on costs a pass that probes."""
        if self._capture is None or self._capture.sides != sides:
            self.close()
            self._capture = self._hooks.enter_context(Capture(self.model, sides))
        return self._capture

    def close(self) -> None:
        """Leave the model as it was."""
        self._capture = None
        self._hooks.close()


def empty_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Memory for rows, from NumPy, which asks for huge pages: first use costs less than torch's."""
    memory = np.empty(rows * width * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(rows, width)


def write_threads(config: CollectConfig, place: Storage) -> int:
    """Threads that write: as asked, else one for four of those that compute here, from 2 to 8.

    With two, one computes while another waits for the disk; more wait for a server.
    """
    computing = min(8, max(2, torch.get_num_threads() // 4))
    return config.write_threads or max(computing, place.concurrency)


def commit_side(writer: Writer, part: int, side: Side, x_RW: Tensor) -> int:
    """Commit the rows of a part on one side; gives their bytes."""
    writer.commit_acts(part, acts_array(side.hookpoint, side.side), x_RW)
    return x_RW.numel() * x_RW.element_size()


def results(work: Sequence[Future[Result]]) -> list[Result]:
    """What the pieces of work gave, when all are done; raises what the first that failed raised."""
    concurrent.futures.wait(work)
    return [one.result() for one in work]


class Background:
    """Does one part's work at a time beside the caller, by several threads: the bound on memory.

    Leaving waits for the work in hand, also when the model failed or Ctrl-C came: what was computed
    is not thrown away.
    """

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads, "commit", initializer=yield_to_others)
        self.pending: list[Future[None]] = []

    def submit(self, works: Iterable[Callable[[], None]]) -> None:
        """Start a part's work when that before is done; raises what that one raised."""
        self.wait()
        self.pending = [self.pool.submit(work) for work in works]

    def wait(self) -> None:
        """Until all work in hand is done; raises what it raised first."""
        pending, self.pending = self.pending, []
        results(pending)

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
