"""The model of a collection: loaded once in a process, it reads one part at a time.

While the model reads a part, the part before is written, so that at most two parts of rows are in
memory: 2 x part_rows x (sum of widths) x bytes of a value. A short part, the last of a split, takes
one array's whole part more for each thread that writes. A GPU adds two batches that are being
copied: 2 x batch_sequences x ctx_len x (sum of widths) x bytes of a value, page-locked.

Shapes: R rows of a part, W width, S sequences, L tokens in a sequence.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.data.permutation import row_permutation
from mpcache.data.special_tokens import special_tokens_of
from mpcache.data.vocabulary import Tokenizer, token_dtype
from mpcache.model.capture_part import capture_part
from mpcache.model.compile import CompiledLayers
from mpcache.model.cut_batches import ForwardBatches, PartInput
from mpcache.model.file_snapshot import ModelFileSnapshot
from mpcache.model.find_separation import find_separation
from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hooks import Capture, widths
from mpcache.model.host_transfer import HostTransfer
from mpcache.model.loading import load_model
from mpcache.model.model_identity import model_digest, model_provenance, tokenizer_digest
from mpcache.model.model_source import find_source


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a store records about the model that fills it: plain values, equal on all machines."""

    digests: Mapping[str, str]
    "digests of the model and of the tokenizer, by their keys in store.json"
    attention: str
    token_dtype: str
    widths: Mapping[Side, int]
    "width of each wanted side, in the model's order"
    provenance: Mapping[str, str | None]
    model_files: str | None = None
    "digest of the files that the model was loaded from; None if no new store needs it"

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(self.widths)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, its tokenizer and their digests, which are slow with large models."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    digests: Mapping[str, str]
    files: ModelFileSnapshot
    "the files that the model was loaded from"
    has_code: bool
    "code that came with the model was run, and may have read any file"

    def files_digest(self) -> str | None:
        """Digest of the model's files. Raises UsageError if they changed since the load."""
        return None if self.has_code else self.files.digest()


def load_for_collection(
    config: CollectConfig,
    tokenizer: Tokenizer | None = None,
    files: ModelFileSnapshot | None = None,
) -> LoadedModel:
    """Load the model, and the tokenizer unless it was loaded from `files` before.

    Raises:
        UsageError: the model cannot be used as it is configured.
        ConnectionError: the Hub does not answer.
    """
    files = files or ModelFileSnapshot.take(find_source(config))  # before anything is loaded
    model, tokenizer = load_model(config, source=files.source, tokenizer=tokenizer)
    files.check_unchanged()
    digests = {"model_digest": model_digest(model)}
    if (own := tokenizer_digest(tokenizer)) is not None:  # a model without a tokenizer has no key
        digests["tokenizer_digest"] = own
    return LoadedModel(model, tokenizer, digests, files, config.trust_remote_code)


class ActivationProducer:
    """Reads parts with a loaded model. Calls must not overlap."""

    def __init__(self, config: CollectConfig, loaded: LoadedModel) -> None:
        self.config, self.model = config, loaded.model
        self.sides = resolve_sides(config.hookpoints, self.model)
        self.widths = widths(self.model, self.sides)
        self.reading = ForwardBatches(
            self.model,
            special_tokens_of(loaded.tokenizer, config),
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
        self._copy = HostTransfer(self.model.device).start if on_gpu else None
        self._compiled = CompiledLayers(self.model, self.sides) if config.compile else None
        self._hooks = ExitStack()
        self._capture: Capture | None = None

    def read_part(
        self,
        part: int,
        tokens: PartInput,
        sides: tuple[Side, ...],
        advance: Callable[[int], object],
    ) -> dict[Side, Tensor]:
        """The rows `[R, W]` of a part, by side, in the storage dtype.

        `advance` is called with the rows of each batch.
        """
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
        """The model as it reads parts: compiled if configured. Probes run without compilation."""
        return self._compiled.used() if self._compiled else nullcontext()

    def _capturing(self, sides: tuple[Side, ...]) -> Capture:
        """Hooks stay on the model from part to part: registering them costs a probing pass."""
        if self._capture is None or self._capture.sides != sides:
            self.close()
            self._capture = self._hooks.enter_context(Capture(self.model, sides))
        return self._capture

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._capture = None
        self._hooks.close()


def empty_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized rows. NumPy asks for huge pages, so that first use costs less than torch's."""
    memory = np.empty(rows * width * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(rows, width)
