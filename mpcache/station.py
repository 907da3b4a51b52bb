"""Where the model stands: it is loaded once in a process and reads parts there, one at a time.

While it reads a part, the part before it is written, so that at most two parts of rows are
in memory: 2 x part_rows x (sum of widths) x bytes of a value, and one array's part read back.

Shapes: R rows of a part, W width, S sequences, L tokens in a sequence.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpcache.config import CollectConfig
from mpcache.format import acts
from mpcache.forward import Reading, capture_part
from mpcache.hooks import Capture, Side, resolve, widths
from mpcache.inputs import find_separation
from mpcache.model import load_model, model_digest, model_provenance, tokenizer_digest
from mpcache.tokenised import token_dtype
from mpcache.tokens import row_permutation, special_tokens
from mpcache.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a store has to know of the model that fills it; plain values, the same everywhere."""

    digests: Mapping[str, str]
    "of model and tokenizer"
    attention: str
    token_dtype: str
    widths: Mapping[Side, int]
    "of the wanted sides, in the model's order"
    provenance: Mapping[str, str | None]

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(self.widths)


@dataclass(frozen=True)
class Loaded:
    """A model in memory, its tokenizer and their digests, which take time with large models."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digests: Mapping[str, str]


def load(config: CollectConfig) -> Loaded:
    """Raises ValueError where the user can help it, ConnectionError without the Hub."""
    model, tokenizer = load_model(config)
    digests = {
        "model_digest": model_digest(model),
        "tokenizer_digest": tokenizer_digest(tokenizer),
    }
    return Loaded(model, tokenizer, digests)


class Station:
    """A loaded model and how a collection uses it. Its calls of the model must not overlap."""

    def __init__(self, config: CollectConfig, loaded: Loaded) -> None:
        self.config, self.model = config, loaded.model
        self.sides = resolve(config.hookpoints, self.model)
        self.widths = widths(self.model, self.sides)
        self.reading = Reading(
            self.model,
            special_tokens(loaded.tokenizer, config),
            find_separation(self.model, config.cross_document_attention),
            config.batch_sequences,
        )
        self.facts = Facts(
            digests=loaded.digests,
            attention=str(self.model.config._attn_implementation),
            token_dtype=token_dtype(loaded.tokenizer).name,
            widths={side: self.widths[side] for side in self.sides},
            provenance=model_provenance(self.model, config),
        )
        self._hooks = ExitStack()
        self._capture: Capture | None = None

    def read(
        self,
        part: int,
        tokens_SL: np.ndarray,
        sides: tuple[Side, ...],
        advance: Callable[[int], object],
    ) -> dict[Side, Tensor]:
        """The rows `[R, W]` of a part in the storage dtype; `advance` is told those of a batch."""
        dtype, rows = getattr(torch, self.config.dtype), tokens_SL.size
        buffers = {side: torch.empty(rows, self.widths[side], dtype=dtype) for side in sides}
        order_R = row_permutation(self.config.seed, part, rows)
        batches = self.reading.batches(tokens_SL)
        capture_part(self._capturing(sides), batches, order_R, buffers, advance)
        return buffers

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


def commit_part(writer: Writer, part: int, buffers: Mapping[Side, Tensor]) -> int:
    """Commit the rows of a part; gives their bytes."""
    for side, x_RW in buffers.items():
        writer.commit_acts(part, acts(side.hookpoint, side.side), x_RW)
    return sum(x.numel() * x.element_size() for x in buffers.values())


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
