"""The store's language model with its head, run with one hookpoint's output replaced.

B: sequences in a forward pass. L: tokens in a sequence. V: size of the vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpcache.causality import is_causal
from mpcache.config import CollectConfig
from mpcache.forward import Reading
from mpcache.hooks import input_of, output_of
from mpcache.inputs import find_separation
from mpcache.masking import Masking
from mpcache.model import Head, MissingWeights, load_model, loader_of, model_digest
from mpcache.place import Place
from mpcache.reader import open_store
from mpcache.sketch import load_architecture
from mpcache.tokens import special_tokens

# (input, output) of the hookpoint, each [B, L, width], to its new output
Replace = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Example:
    """Tokens of a store, and what the model is to predict of them."""

    inputs: dict[str, Tensor]
    "the model's arguments"
    tokens_BL: Int64[Tensor, "B L"]
    "as they are in the store, where some are hidden from the model"
    wanted_BL: Int64[Tensor, "B L"]
    "the token that the logits of a position are to predict"
    counts_BL: Bool[Tensor, "B L"]
    "whether the logits of a position count"


class SplicedModel:
    """A language model with its head, and the tokens of a store's validation split."""

    def __init__(
        self, store: str | Path | Place, model: str, revision: str | None, device: str
    ) -> None:
        """Load the model, with the causal head if it is causal, else with its masked head.

        Raises:
            ValueError: there is no store, `model` is not the one it was made from, or it has no
                head of the right kind.
        """
        self.store = open_store(store)
        stored = {**self.store.config, "hookpoints": tuple(self.store.config["hookpoints"])}
        self.config = replace(
            CollectConfig(**stored),
            model=model,
            revision=revision or stored["revision"],
            trust_remote_code=False,  # the store may be somebody else's: its word is not enough
            device=device,
        )
        missing = ""
        for head in heads_of(self.config):
            try:
                tokenizer = self._load(head)
            except MissingWeights as error:  # such as those of a head in a checkpoint of a base
                missing = f" ({error})"
                continue
            if (head == "causal") == is_causal(self._all_logits, self._first_inputs()):
                break
        else:
            raise ValueError(
                f"{model} has neither a causal head nor, as a bidirectional model, the weights of "
                f"a masked one{missing}; cross-entropy needs one, so leave --model out"
            )
        self.head: Head = head
        self.masking = masking_of(tokenizer, self.config) if head == "masked" else None

    def _load(self, head: Head) -> PreTrainedTokenizerBase:
        self.model, tokenizer = load_model(self.config, head=head)
        base = self.model.base_model
        assert isinstance(base, PreTrainedModel)
        digest = self.store.identity["model_digest"]
        if model_digest(base) != digest and not is_part_of_collected(base, self.config, digest):
            raise ValueError(
                f"{self.store.place} was made from another model than {self.config.model}; name "
                f"{self.store.provenance['model']['model']}, "
                f"revision {self.store.config['revision']}"
            )
        separation = find_separation(
            base, self.config.cross_document_attention, getattr(torch, self.config.model_dtype)
        )
        specials = special_tokens(tokenizer, self.config)
        # one sequence at a time: logits of a large vocabulary are what memory goes to
        self.reading = Reading(self.model, specials, separation, batch_sequences=1)
        return tokenizer

    def _first_inputs(self) -> dict[str, Tensor]:
        inputs = next(self.batches(), None)
        if inputs is None:
            raise ValueError(f"{self.store.place} has no validation tokens yet; collect more rows")
        return inputs

    def _all_logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "B L V"]:
        return self.logits(dict(inputs), "")

    def examples(self) -> Iterator[Example]:
        """All committed validation tokens, with what the model is to predict.

        With a causal head that is the next token, with a masked one the tokens that are hidden.
        """
        for inputs in self.batches():
            ids_BL = inputs["input_ids"]
            if self.masking is None:
                counts_BL = torch.ones_like(ids_BL, dtype=torch.bool)
                counts_BL[:, -1] = False
                yield Example(inputs, ids_BL, ids_BL.roll(-1, dims=1), counts_BL)
            else:
                hidden = [self.masking.hide(ids_L.cpu().numpy()) for ids_L in ids_BL]
                shown_BL, counts_BL = (
                    torch.from_numpy(np.stack(arrays)).to(ids_BL.device)
                    for arrays in zip(*hidden, strict=True)
                )
                yield Example({**inputs, "input_ids": shown_BL}, ids_BL, ids_BL, counts_BL)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The model's arguments for all committed validation tokens."""
        for part in self.store.numbers("tokens"):
            if self.store.layout.split_of(part) == "validation":
                yield from self.reading.batches(self.store.read_tokens(part))

    @torch.no_grad()
    def logits(
        self, inputs: dict[str, Tensor], hookpoint: str, new: Replace | None = None
    ) -> Float[Tensor, "B L V"]:
        """Logits of the head, with the hookpoint's output replaced if `new` is given."""
        module: nn.Module = self.model.base_model.get_submodule(hookpoint)
        hooks = [module.register_forward_hook(_replacing(new), with_kwargs=True)] if new else []
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
    return [head for head in heads if loader_of(architecture, head) is not None]


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


def masking_of(tokenizer: PreTrainedTokenizerBase, config: CollectConfig) -> Masking:
    """Raises ValueError where the tokenizer has no mask token."""
    mask = tokenizer.mask_token_id
    if not isinstance(mask, int):
        raise ValueError(
            f"a bidirectional model must have a mask token, got none in the tokenizer of "
            f"{config.model}; leave the model out"
        )
    return Masking(mask, set(tokenizer.all_special_ids), len(tokenizer))


def _replacing(new: Replace) -> Callable[..., Any]:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        value = output_of(output)
        assert isinstance(value, Tensor)
        source = input_of(args, kwargs)
        assert isinstance(source, Tensor)
        changed = new(source, value).to(value.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
