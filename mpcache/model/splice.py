"""A store's language model with its head, run with the value at one side replaced.

B: sequences in a forward pass. L: tokens in a sequence. V: size of the vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.data.special_tokens import special_tokens_of
from mpcache.data.vocabulary import ConfigTokens, Tokenizer, largest_token_id
from mpcache.errors import UsageError
from mpcache.model.bert_masking import BertMasking
from mpcache.model.causality import is_causal
from mpcache.model.checkpoint_validation import MissingWeightsError
from mpcache.model.cut_batches import ForwardBatches
from mpcache.model.find_separation import find_separation
from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hooks import input_of, output_of
from mpcache.model.inputs import ModelInputs
from mpcache.model.loading import Head, auto_class_for, load_model
from mpcache.model.model_config import load_architecture
from mpcache.model.model_identity import model_digest
from mpcache.model.prediction_examples import Example, ValidationExamples
from mpcache.storage.base import Storage
from mpcache.store.fingerprint import stored_settings
from mpcache.store.reader import Store, open_store

# (source, target), each [B, L, width] -> the new value of the target
Replace = Callable[[Tensor, Tensor], Tensor]


class SplicedModel:
    """A language model with its head, and the validation tokens of a store."""

    def __init__(
        self,
        store: str | Path | Storage,
        model: str,
        revision: str | None,
        device: str,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model with its causal head, or its masked head if it is bidirectional.

        Raises:
            UsageError: there is no store, the store was made from another model, or the model has
                no head of the right kind.
        """
        self.store = open_store(store)
        self.config = _config_of(self.store, model, revision, device, trust_remote_code)
        missing = ""
        for head in _possible_heads(self.config):
            try:
                tokenizer = self._load(head)
            except MissingWeightsError as error:  # such as a head in the checkpoint of a base model
                missing = f" ({error})"
                continue
            inputs = ValidationExamples(self.store, self._batches, None).longest_inputs()
            if (head == "causal") == is_causal(self.logits, inputs):
                break
        else:
            raise UsageError(
                "cross-entropy needs a causal language-model head, or in a bidirectional model the "
                f"weights of a masked language-model head, got neither in {model}{missing}; remove "
                "--model"
            )
        self.head: Head = head
        masking = _masking(tokenizer, self.config) if head == "masked" else None
        self._examples = ValidationExamples(self.store, self._batches, masking)

    def _load(self, head: Head) -> Tokenizer:
        self.model, tokenizer = load_model(self.config, head=head)
        base = self.model.base_model
        assert isinstance(base, PreTrainedModel)
        digest = self.store.identity["model_digest"]
        if model_digest(base) != digest and not _is_part_of_collected(base, self.config, digest):
            raise UsageError(
                f"{self.store.storage} was collected from another model than "
                f"{self.config.model}; give --model "
                f"{self.store.provenance['model']['model']} --revision "
                f"{self.store.config['revision']}"
            )
        separation = find_separation(base, self.config, resolve_sides(self.config.hookpoints, base))
        specials = special_tokens_of(tokenizer, self.config)
        # one sequence per pass: the logits of a large vocabulary take most of the memory
        self._batches = ForwardBatches(self.model, specials, separation, batch_sequences=1)
        return tokenizer

    def examples(self) -> Iterator[Example]:
        """All committed validation tokens, with what the model must predict.

        A causal head predicts the next token, a masked head the hidden tokens.
        """
        return iter(self._examples)

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


def _config_of(
    store: Store, model: str, revision: str | None, device: str, trust_remote_code: bool
) -> CollectConfig:
    """The config of a store's collection, with the model at its present location."""
    settings = {**store.config, **stored_settings(store.identity)}
    settings["hookpoints"] = tuple(settings["hookpoints"])
    return replace(
        CollectConfig(**settings),
        model=model,
        revision=revision or settings["revision"],
        # the store may come from somebody else: only the user can allow its model's code
        trust_remote_code=trust_remote_code,
        device=device,
    )


# --- heads ---


def _possible_heads(config: CollectConfig) -> list[Head]:
    """The heads that models of this class have; the more likely head comes first."""
    architecture = load_architecture(config)
    is_decoder = getattr(architecture, "is_decoder", False)
    heads: tuple[Head, ...] = ("causal", "masked") if is_decoder else ("masked", "causal")
    return [head for head in heads if auto_class_for(architecture, head) is not None]


def _is_part_of_collected(base: PreTrainedModel, config: CollectConfig, digest: str) -> bool:
    """Whether the model of that digest has all weights of `base`, bit for bit, and others.

    The base model of BERT has a pooler, which BERT with a masked head lacks.
    """
    collected, _ = load_model(config)
    weights = collected.state_dict()
    return model_digest(collected) == digest and all(
        name in weights and torch.equal(weights[name], weight)
        for name, weight in base.state_dict().items()
    )


def _masking(tokenizer: Tokenizer, config: CollectConfig) -> BertMasking:
    """Raises UsageError for a tokenizer without a mask token."""
    mask = None if isinstance(tokenizer, ConfigTokens) else tokenizer.mask_token_id
    if not isinstance(mask, int):
        raise UsageError(
            "a bidirectional model must have a mask token, got none in the tokenizer of "
            f"{config.model}; remove --model"
        )
    return BertMasking(mask, set(tokenizer.all_special_ids), largest_token_id(tokenizer) + 1)


# --- replacing a side ---


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
                f"the model computes {target} before {source}, so a coder cannot replace "
                f"{target} while the model runs; remove --model"
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
            tuple(changed if arg is value else arg for arg in args),
            {name: changed if arg is value else arg for name, arg in kwargs.items()},
        )

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        value = output_of(output)
        assert isinstance(value, Tensor)
        changed = change(value)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    if side.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)
