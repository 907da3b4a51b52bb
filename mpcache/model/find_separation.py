"""Finds what separates the documents of a batch in a model, by trials in its dtype and attention.

No bit of a document's values may change when other documents of its sequence change. A trial
exchanges documents between the two sequences of a batch. Compared with new tokens, an exchange
keeps the tokens of the batch, so kernels whose shapes depend on tokens (the matrix product of an
expert over the tokens routed to the expert) see the same shapes, and bits must agree as well. Where
bits do not agree, because a kernel adds in a different order each time, a control bounds the
difference: the same exchange in two other sequences of the batch.

The values must also equal those of the document alone, because positions or windows may be wrong
without any flow of information. There the batch shapes differ, and so do the bits. The bound is the
change of the document alone when the last bits of its embeddings change.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.errors import UsageError
from mpcache.model.hookpoint_patterns import Side
from mpcache.model.hooks import Capture
from mpcache.model.inputs import (
    PACKED_SEPARATIONS,
    ModelInputs,
    Separation,
    packed_inputs,
    padded_inputs,
)
from mpcache.model.separation_lengths import (
    CHUNK,
    fit_to_context,
    length_dependent_rotary,
    longest_setting,
)
from mpcache.model.separation_trial import (
    InputsOf,
    SeparationTrial,
    Sequences,
    TrialError,
    Values,
    random_documents,
)

# A state, a short convolution, a token shift or an open mask already affects the next document. So
# documents are short: one token, a few tokens, and more than a chunk of linear attention (64
# tokens), with one boundary inside a chunk and one in the next chunk.
SHORT_LENGTHS = (5, 1, 2, 17)
PADDED_LENGTHS = ((5, CHUNK), (1, 3))  # a document and the padding after it
# Settings with these words in their names are lengths of chunks and windows. A longer chunk may
# pass information on at its end. A window has an effect only in a longer document.
_CHUNKS = ("chunk", "block")
_WINDOWS = (*_CHUNKS, "window", "local")

EARLIER, LATER = slice(0, 1), slice(1, None)  # documents of a sequence


@dataclass(frozen=True)
class Fault:
    """A reason why documents are not separated."""

    rank: int
    "the fault with the highest rank is reported"
    reason: Callable[[], str]
    remedy: str = ""
    "replaces the usual remedy"


def find_separation(
    model: PreTrainedModel, config: CollectConfig, sides: Sequence[Side]
) -> Separation:
    """The separation of documents that `config` asks for and that holds in all values of `sides`.

    Raises UsageError where no separation holds.
    """
    if config.one_document_per_sequence:
        return _first_without_fault(
            model, config, sides, ("alone", "alone with mask", "alone unpadded"), _padded_faults,
            "keep the documents of a batch apart", "remove --one-document-per-sequence",
        )  # fmt: skip
    if config.cross_document_attention:
        return "none"
    return _first_without_fault(
        model, config, sides, PACKED_SEPARATIONS, _packed_faults,
        "keep the documents of a sequence apart", "use --one-document-per-sequence",
    )  # fmt: skip


def _first_without_fault(
    model: PreTrainedModel,
    config: CollectConfig,
    sides: Sequence[Side],
    separations: Sequence[Separation],
    faults_of: Callable[[SeparationTrial, Separation, int], Iterator[Fault]],
    task: str,
    remedy: str,
) -> Separation:
    faults = [*_setting_faults(model.config, config.ctx_len)]
    with Capture(model, sides) as capture:
        trial = SeparationTrial(model, capture, getattr(torch, config.model_dtype))
        for separation in separations if not faults else ():
            if (fault := next(faults_of(trial, separation, config.ctx_len), None)) is None:
                return separation
            faults.append(fault)
    fault = max(faults, key=lambda fault: fault.rank)
    raise UsageError(
        f"{type(model).__name__} cannot {task}: {fault.reason()}; {fault.remedy or remedy}"
    )


# --- faults of one separation ---


def _packed_faults(trial: SeparationTrial, separation: Separation, ctx_len: int) -> Iterator[Fault]:
    """Faults of documents that are packed into sequences."""

    def inputs_of(sequences: Sequences) -> ModelInputs:
        tokens_SL = np.stack([np.concatenate(sequence) for sequence in sequences])
        positions_SL = np.stack([_positions(sequence) for sequence in sequences])
        return packed_inputs(tokens_SL, positions_SL, separation, trial.model)

    config = trial.model.config
    chunk, window = (longest_setting(config, words, ctx_len) for words in (_CHUNKS, _WINDOWS))
    try:
        short = _two_sequences(trial, fit_to_context(SHORT_LENGTHS, ctx_len))
        before = trial.values(inputs_of(short))
        yield from _flow_faults(trial, before, short, inputs_of, (EARLIER, LATER))
        long = _two_sequences(trial, fit_to_context(_long_lengths(chunk), ctx_len))
        before = trial.values(inputs_of(long))
        yield from _flow_faults(trial, before, long, inputs_of, (EARLIER,))
        if window > chunk:
            long = _two_sequences(trial, fit_to_context(_long_lengths(window), ctx_len))
            before = trial.values(inputs_of(long))
        yield from _alone_faults(trial, before, long[1])
        if "position_ids" not in inspect.signature(trial.model.forward).parameters:
            # such as ALiBi, whose rounding grows with the distance to the sequence's end
            yield Fault(
                1,
                lambda: (
                    "the model counts positions over the whole sequence, not within each document"
                ),
            )
    except TrialError as error:
        yield _error_fault(
            "the model does not accept the positions or masks that keep documents apart", error
        )


def _padded_faults(trial: SeparationTrial, separation: Separation, ctx_len: int) -> Iterator[Fault]:
    """Faults of documents that are sequences of a batch."""

    def inputs_of(sequences: Sequences) -> ModelInputs:
        tokens_SL = np.stack([np.concatenate(sequence) for sequence in sequences])
        is_token_SL = np.zeros(tokens_SL.shape, np.bool_)
        is_token_SL[:, : len(sequences[0][0])] = True
        return padded_inputs(tokens_SL, is_token_SL, separation, trial.model)

    try:
        for lengths in PADDED_LENGTHS:
            sequences = _two_sequences(trial, fit_to_context(lengths, ctx_len))
            if separation == "alone unpadded":
                sequences = [sequence[:1] for sequence in sequences]
            before = trial.values(inputs_of(sequences))
            yield from _flow_faults(trial, before, sequences, inputs_of, (LATER,))
            yield from _alone_faults(trial, before, sequences[1][:1])
    except TrialError as error:
        yield _error_fault("the model does not accept a mask of padding", error)


def _error_fault(reason: str, error: TrialError) -> Fault:
    return Fault(0, functools.partial(str, f"{reason} ({error})"))


def _alone_faults(
    trial: SeparationTrial, values: Values, documents: Sequence[np.ndarray]
) -> Iterator[Fault]:
    """A fault if documents have different values alone and in the batch's second sequence."""
    if trial.differs_from_alone(documents, values, row=1):
        yield Fault(
            1, lambda: "the values of a document differ from those of the same document run alone"
        )


def _flow_faults(
    trial: SeparationTrial,
    before: Values,
    sequences: Sequences,
    inputs_of: InputsOf,
    exchanges: Sequence[slice],
) -> Iterator[Fault]:
    """Faults if information flows between documents, forwards or backwards.

    The batch has the same tokens before the values that are compared. So later documents are
    compared in the second sequence, and the first document in the first sequence.
    """
    end = len(sequences[0][0])
    for documents in exchanges:
        compared = (1, slice(end, None)) if documents == EARLIER else (0, slice(0, end))
        exchange = (sequences, documents, inputs_of, *compared)
        if trial.has_flow(before, *exchange):
            yield Fault(2, functools.partial(_flow_reason, trial, exchange))


def _flow_reason(trial: SeparationTrial, exchange: Any) -> str:
    return f"{trial.first_module(*exchange)} carries information between documents"


def _two_sequences(trial: SeparationTrial, lengths: Sequence[int]) -> Sequences:
    return [random_documents(trial.model, lengths, seed) for seed in range(2)]


def _positions(sequence: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.arange(len(document)) for document in sequence])


def _long_lengths(long: int) -> tuple[int, ...]:
    return 9, 1, long + 3, 3


# --- settings that make a token depend on its batch at lengths that no trial reaches ---


def _setting_faults(config: PreTrainedConfig, ctx_len: int) -> Iterator[Fault]:
    settings = config.get_text_config().to_dict()
    reasons = [
        (
            f"the experts of the model take a limited number of tokens of a batch ({name}={value})",
            "to let documents mix, use --cross-document-attention and remove "
            "--one-document-per-sequence",
        )
        for name, value in settings.items()
        if "capacity" in name and value
    ]
    reasons += [
        (
            f"its {kind} rotary embedding changes with the longest document of a batch beyond "
            f"{limit} tokens, and ctx_len is {ctx_len}",
            f"use --ctx-len {limit}",
        )
        for kind, limit in length_dependent_rotary(settings)
        if ctx_len > limit
    ]
    return (Fault(3, functools.partial(str, reason), remedy) for reason, remedy in reasons)
