"""The token ids of a model: their range, their special tokens, and their dtype."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt
from transformers import PreTrainedTokenizerBase

Tokens = UInt[np.ndarray, " _"]
Indices = Int64[np.ndarray, " _"]


@dataclass(frozen=True)
class ConfigTokens:
    """Token ids as a model's config names them, for a model without a tokenizer."""

    vocab_size: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None

    @property
    def all_special_ids(self) -> list[int]:
        """The special ids that the config names."""
        ids = (self.bos_token_id, self.eos_token_id, self.cls_token_id, self.sep_token_id)
        return [i for i in ids if i is not None]


Tokenizer = PreTrainedTokenizerBase | ConfigTokens


@dataclass(frozen=True)
class Vocabulary:
    """What reading a dataset needs to know of a model's token ids."""

    end: int | None
    "the token that ends a document in a `.bin`"
    dtype: np.dtype[Any]
    "the smallest unsigned integer that holds the tokenizer's ids"
    largest_id: int
    "the largest id that a dataset of token ids may hold"
    has_tokenizer: bool = True
    "False: the dataset must hold token ids, because texts and chats cannot be tokenized"


def vocabulary_of(tokenizer: Tokenizer, embeddings: int | None = None) -> Vocabulary:
    """`embeddings`: rows of the model's embedding; None where only the tokenizer is known."""
    dtype = token_dtype(tokenizer)
    largest = largest_token_id(tokenizer) if embeddings is None else embeddings - 1
    largest = min(largest, int(np.iinfo(dtype).max))  # stores hold tokens in this dtype
    has_tokenizer = not isinstance(tokenizer, ConfigTokens)
    return Vocabulary(end_token_id(tokenizer), dtype, largest, has_tokenizer)


def end_token_id(tokenizer: Tokenizer) -> int | None:
    """The token that ends a document: EOS, or SEP without an EOS."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token, int):
            return token
    return None


def largest_token_id(tokenizer: Tokenizer) -> int:
    """The largest token id. Ids may have gaps, so this is not the number of tokens minus one."""
    if isinstance(tokenizer, ConfigTokens):
        return tokenizer.vocab_size - 1
    return max(tokenizer.get_vocab().values())


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest unsigned integer dtype that holds every token id."""
    return np.dtype(np.min_scalar_type(largest_token_id(tokenizer)))
