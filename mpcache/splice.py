"""The store's language model with its head, run with one hookpoint's output replaced.

B: sequences in a forward pass. L: tokens in a sequence. V: size of the vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpcache.config import CollectConfig
from mpcache.format import BY_ASSISTANT
from mpcache.forward import PartInput, Reading, part_input, piece_places
from mpcache.hooks import input_of, output_of, resolve
from mpcache.identity import ways_of
from mpcache.inputs import ModelInputs, piece_inputs
from mpcache.isolation import find_separation
from mpcache.model import load_model, model_digest
from mpcache.place import Place
from mpcache.reader import open_store
from mpcache.tokens import special_tokens

# (input, output) of the hookpoint, each [B, L, width], to its new output
Replace = Callable[[Tensor, Tensor], Tensor]


class SplicedModel:
    """A causal language model and the tokens of a store's validation split."""

    def __init__(
        self,
        store: str | Path | Place,
        model: str,
        revision: str | None,
        device: str,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model.

        Raises:
            ValueError: there is no store, or `model` is not the one it was made from.
        """
        self.store = open_store(store)
        ways = ways_of(self.store.identity)
        stored = {**self.store.config, **ways, "hookpoints": tuple(self.store.config["hookpoints"])}
        config = replace(
            CollectConfig(**stored),
            model=model,
            revision=revision or stored["revision"],
            # the store may be somebody else's: its word is not enough
            trust_remote_code=trust_remote_code,
            device=device,
        )
        self.model, tokenizer = load_model(config, with_head=True)
        base = self.model.base_model
        assert isinstance(base, PreTrainedModel)
        if model_digest(base) != self.store.identity["model_digest"]:
            raise ValueError(
                f"{self.store.place} was made from another model than {model}; name "
                f"{self.store.provenance['model']['model']}, revision {stored['revision']}"
            )
        separation = find_separation(base, config, resolve(config.hookpoints, base))
        specials = special_tokens(tokenizer, config)
        # one sequence at a time: logits of a large vocabulary are what memory goes to
        self.reading = Reading(self.model, specials, separation, batch_sequences=1)

    def batches(self) -> Iterator[ModelInputs]:
        """The model's arguments for all committed validation tokens."""
        for part in self.store.numbers("tokens"):
            if self.store.layout.split_of(part) == "validation":
                yield from self._inputs(part_input(self.store, part))

    def _inputs(self, part: PartInput) -> Iterator[ModelInputs]:
        if part.starts_SL is None:
            yield from (batch.inputs for batch in self.reading.batches(*part))
            return
        for place in piece_places(part.starts_SL, part.rows):
            if len(place) > 1:  # a lone token predicts nothing
                piece = part.tokens_SL.reshape(-1)[place]
                yield piece_inputs([piece], self.reading.separation, self.model)[0]

    def assistant(self) -> Iterator[Bool[Tensor, "B L"]]:
        """Of the tokens of each batch whether the assistant wrote them."""
        for part in self.store.numbers("tokens"):
            if self.store.layout.split_of(part) == "validation":
                flags_SL = self.store.read_flags(part)
                assert flags_SL is not None
                for place in _places(part_input(self.store, part)):
                    written_L = (flags_SL.reshape(-1)[place] & BY_ASSISTANT) > 0
                    yield torch.from_numpy(written_L)[None].to(self.model.device)

    @torch.no_grad()
    def logits(
        self, inputs: ModelInputs, hookpoint: str, new: Replace | None = None
    ) -> Float[Tensor, "B L V"]:
        """Next-token logits, with the hookpoint's output replaced if `new` is given."""
        module: nn.Module = self.model.base_model.get_submodule(hookpoint)
        hooks = [module.register_forward_hook(_replacing(new), with_kwargs=True)] if new else []
        try:
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits.float()


def _places(part: PartInput) -> list[Int64[np.ndarray, " _"]]:
    """For each batch its tokens, counted along the part's sequences."""
    if part.starts_SL is None:
        return list(np.arange(part.tokens_SL.size).reshape(part.tokens_SL.shape))
    return [place for place in piece_places(part.starts_SL, part.rows) if len(place) > 1]


def _replacing(new: Replace) -> Callable[..., Any]:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        value = output_of(output)
        assert isinstance(value, Tensor)
        source = input_of(args, kwargs)
        assert isinstance(source, Tensor)
        changed = new(source, value).to(value.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
