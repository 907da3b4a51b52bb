"""The store's language model with its head, run with one side of a hookpoint replaced.

B: sequences in a forward pass. L: tokens in a sequence. V: size of the vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.data.document_boundaries import document_starts
from mpcache.data.special_tokens import special_tokens_of
from mpcache.data.vocabulary import ConfigTokens, Tokenizer, largest_token_id
from mpcache.errors import UsageError
from mpcache.model.architecture import load_architecture
from mpcache.model.bert_masking import BertMasking
from mpcache.model.causality import is_causal
from mpcache.model.checkpoint_validation import MissingWeightsError
from mpcache.model.document_separation import find_separation
from mpcache.model.forward_batches import ForwardBatches, part_input, piece_tokens
from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hooks import input_of, output_of
from mpcache.model.inputs import PACKED_SEPARATIONS, ModelInputs, piece_inputs
from mpcache.model.loading import Head, auto_class_for, load_model
from mpcache.model.model_identity import model_digest
from mpcache.storage.base import Storage
from mpcache.store.fingerprint import stored_settings
from mpcache.store.format import BY_ASSISTANT
from mpcache.store.reader import open_store

# values of the source and the target side, each [B, L, width], to the target's new value
Replace = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Example:
    """Tokens of a store, and what the model is to predict of them."""

    inputs: ModelInputs
    "the model's arguments"
    tokens_BL: Int64[Tensor, "B L"]
    "as they are in the store, where some are hidden from the model"
    wanted_BL: Int64[Tensor, "B L"]
    "the token that the logits of a position are to predict"
    counts_BL: Bool[Tensor, "B L"]
    "whether the logits of a position count"
    by_assistant_BL: Bool[Tensor, "B L"] | None
    "whether the assistant of a conversation wrote the token; None: the store does not say"


class SplicedModel:
    """A language model with its head, and the tokens of a store's validation split."""

    def __init__(
        self,
        store: str | Path | Storage,
        model: str,
        revision: str | None,
        device: str,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model, with the causal head if it is causal, else with its masked head.

        Raises:
            UsageError: there is no store, `model` is not the one it was made from, or it has no
                head of the right kind.
        """
        self.store = open_store(store)
        ways = stored_settings(self.store.identity)
        stored = {**self.store.config, **ways, "hookpoints": tuple(self.store.config["hookpoints"])}
        self.config = replace(
            CollectConfig(**stored),
            model=model,
            revision=revision or stored["revision"],
            # the store may be somebody else's: only the user can allow its model's code
            trust_remote_code=trust_remote_code,
            device=device,
        )
        missing = ""
        for head in heads_of(self.config):
            try:
                tokenizer = self._load(head)
            except (
                MissingWeightsError
            ) as error:  # such as those of a head in a checkpoint of a base
                missing = f" ({error})"
                continue
            if (head == "causal") == is_causal(self._all_logits, self._longest_inputs()):
                break
        else:
            raise UsageError(
                f"{model} has neither a causal head nor, as a bidirectional model, the weights of "
                f"a masked one{missing}; cross-entropy needs one, so leave --model out"
            )
        self.head: Head = head
        self.masking = masking_of(tokenizer, self.config) if head == "masked" else None

    def _load(self, head: Head) -> Tokenizer:
        self.model, tokenizer = load_model(self.config, head=head)
        base = self.model.base_model
        assert isinstance(base, PreTrainedModel)
        digest = self.store.identity["model_digest"]
        if model_digest(base) != digest and not is_part_of_collected(base, self.config, digest):
            raise UsageError(
                f"{self.store.storage} was made from another model than {self.config.model}; name "
                f"{self.store.provenance['model']['model']}, "
                f"revision {self.store.config['revision']}"
            )
        separation = find_separation(base, self.config, resolve_sides(self.config.hookpoints, base))
        specials = special_tokens_of(tokenizer, self.config)
        # one sequence at a time: logits of a large vocabulary are what memory goes to
        self.reading = ForwardBatches(self.model, specials, separation, batch_sequences=1)
        return tokenizer

    def examples(self) -> Iterator[Example]:
        """All committed validation tokens, with what the model is to predict.

        With a causal head that is the next token, with a masked head the tokens that are hidden.
        """
        for part in self._parts():
            flags_SL = self.store.tokens.read_flags(part) if self.store.has_assistant else None
            for inputs, tokens_L in self._inputs(part):
                by_assistant_BL = None
                if flags_SL is not None:
                    written_L = (flags_SL.reshape(-1)[tokens_L] & BY_ASSISTANT) > 0
                    by_assistant_BL = torch.from_numpy(written_L)[None].to(self.model.device)
                yield self._example(inputs, by_assistant_BL)

    def _example(self, inputs: ModelInputs, by_assistant_BL: Bool[Tensor, "B L"] | None) -> Example:
        ids_BL = inputs["input_ids"]
        if self.masking is None:
            counts_BL = ~self._ends_document(ids_BL)
            return Example(inputs, ids_BL, ids_BL.roll(-1, dims=1), counts_BL, by_assistant_BL)
        hidden = [self.masking.hide(ids_L.cpu().numpy()) for ids_L in ids_BL]
        shown_BL, counts_BL = (
            torch.from_numpy(np.stack(arrays)).to(ids_BL.device)
            for arrays in zip(*hidden, strict=True)
        )
        shown = {**inputs, "input_ids": shown_BL}
        return Example(shown, ids_BL, ids_BL, counts_BL, by_assistant_BL)

    def _ends_document(self, ids_BL: Int64[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """Where the token that follows is no continuation for the model.

        It is the end of a sequence, and where documents are kept apart, of a document.
        """
        ends_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        ends_BL[:, -1] = True
        if self.reading.separation in PACKED_SEPARATIONS:
            tokens_BL = ids_BL.cpu().numpy().astype(np.uint32)
            starts_BL = torch.from_numpy(document_starts(tokens_BL, self.reading.specials))
            ends_BL[:, :-1] |= starts_BL[:, 1:].to(ids_BL.device)
        return ends_BL

    def _parts(self) -> list[int]:
        """The parts of the validation split."""
        numbers = self.store.part_numbers("tokens")
        return [part for part in numbers if self.store.layout.split_of(part) == "validation"]

    def _inputs(self, part: int) -> Iterator[tuple[ModelInputs, Int64[np.ndarray, " L"]]]:
        """The model's arguments for one sequence after the other, with its tokens' indices."""
        held = part_input(self.store, part)
        if held.starts_SL is None:
            yield from ((batch.inputs, batch.tokens) for batch in self.reading.batches(*held))
            return
        for tokens_L in piece_tokens(held.starts_SL, held.rows):
            if len(tokens_L) > 1:  # a lone token predicts nothing
                piece = held.tokens_SL.reshape(-1)[tokens_L]
                yield piece_inputs([piece], self.reading.separation, self.model)[0], tokens_L

    def _longest_inputs(self) -> ModelInputs:
        """The longest sequence of the first validation part."""
        inputs = (inputs for part in self._parts()[:1] for inputs, _ in self._inputs(part))
        longest = max(inputs, key=lambda one: one["input_ids"].numel(), default=None)
        if longest is None and not self._parts():
            raise UsageError(
                f"{self.store.storage} has no validation tokens yet; collect more rows"
            )
        if longest is None or longest["input_ids"].numel() < 2:
            raise UsageError(
                f"{self.store.storage} must have a held-out sequence of two tokens or more, "
                "got none to predict from; collect longer documents, or with a longer ctx_len"
            )
        return longest

    def _all_logits(self, inputs: ModelInputs) -> Float[Tensor, "B L V"]:
        return self.logits(inputs)

    @torch.no_grad()
    def logits(
        self,
        inputs: ModelInputs,
        source: Side | None = None,
        target: Side | None = None,
        new: Replace | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Logits of the head. With `new`, the target side is replaced by `new(source, target)`.

        Raises:
            UsageError: the model computes the target side before the source side.
        """
        hooks = []
        if source is not None and target is not None and new is not None:
            hooks = splice_hooks(self.model.base_model, source, target, new)
        try:
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits.float()


def heads_of(config: CollectConfig) -> list[Head]:
    """The heads that models of this class have, first the one that is more likely to be meant."""
    architecture = load_architecture(config)
    is_decoder = getattr(architecture, "is_decoder", False)
    heads: tuple[Head, ...] = ("causal", "masked") if is_decoder else ("masked", "causal")
    return [head for head in heads if auto_class_for(architecture, head) is not None]


def is_part_of_collected(base: PreTrainedModel, config: CollectConfig, digest: str) -> bool:
    """Whether the model of that digest has all weights of this one, bit for bit, and more.

    A masked language model of BERT's kind has no pooler, which its base model alone has.
    """
    collected, _ = load_model(config)
    weights = collected.state_dict()
    return model_digest(collected) == digest and all(
        name in weights and torch.equal(weights[name], weight)
        for name, weight in base.state_dict().items()
    )


def masking_of(tokenizer: Tokenizer, config: CollectConfig) -> BertMasking:
    """Raises UsageError where the tokenizer has no mask token."""
    mask = None if isinstance(tokenizer, ConfigTokens) else tokenizer.mask_token_id
    if not isinstance(mask, int):
        raise UsageError(
            f"a bidirectional model must have a mask token, got none in the tokenizer of "
            f"{config.model}; leave --model out"
        )
    return BertMasking(mask, set(tokenizer.all_special_ids), largest_token_id(tokenizer) + 1)


def splice_hooks(
    base: nn.Module, source: Side, target: Side, new: Replace
) -> list[RemovableHandle]:
    """Hooks that keep the source side's value and replace the target side's."""
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept[:] = [value]
        return value

    def replace_value(value: Tensor) -> Tensor:
        if source == target:
            kept[:] = [value]
        if not kept:
            raise UsageError(
                f"the model computes {target} before {source}, so that it cannot be predicted "
                "while the model runs; leave --model out"
            )
        return new(kept.pop(), value).to(value.dtype)

    changes = (
        [(target, replace_value)] if source == target else [(source, keep), (target, replace_value)]
    )
    return [_change_side(base.get_submodule(s.hookpoint), s, change) for s, change in changes]


def _change_side(
    module: nn.Module, side: Side, change: Callable[[Tensor], Tensor]
) -> RemovableHandle:
    """Pass a side's value through a function whenever the module runs."""

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        value = input_of(args, kwargs)
        assert isinstance(value, Tensor)
        changed = change(value)
        return (
            tuple(changed if one is value else one for one in args),
            {name: changed if one is value else one for name, one in kwargs.items()},
        )

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        value = output_of(output)
        assert isinstance(value, Tensor)
        changed = change(value)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    if side.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)
