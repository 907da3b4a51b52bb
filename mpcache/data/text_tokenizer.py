"""Texts -> token ids, with names of special tokens read as plain text or as special tokens.

To read a name such as <|endoftext|> as plain text, `encode_special_tokens` of `tokenizers` is not
enough: a Unigram or word-level vocabulary may contain the name itself. So the special tokens of a
copy of the tokenizer get other names, which no text contains. Their ids stay. The special tokens
that a chat template writes are renamed in its output as well.
"""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from mpcache.errors import UsageError

_BREAK = hashlib.sha256(b"mpcache break").hexdigest()
"breaks up names of special tokens in messages until the template has written its own"


class LiteralTextTokenizer:
    """Texts -> token ids, none of them special: names of special tokens are plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UsageError for a tokenizer whose special tokens cannot be renamed."""
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.names = {name: _hidden_name(name) for name in special_names(tokenizer, state)}
        "new names of the special tokens"
        self.backend = Tokenizer.from_str(json.dumps(_renamed(state, self.names)))
        self.unknown = _unknown_id(state)
        before, after = tokenizer.backend_tokenizer.token_to_id, self.backend.token_to_id
        if any(before(old) != after(new) for old, new in self.names.items()):
            raise UsageError(
                f"special tokens of {type(tokenizer).__name__} cannot be distinguished from the "
                "same characters in a text; use --parse-special-tokens"
            )
        ids = {before(name) for name in self.names} - {self.unknown, None}
        self.special_ids = np.array(sorted(ids), np.uint32)

    def encode(self, texts: Sequence[str]) -> list[UInt32[np.ndarray, " _"]]:
        """Token ids of texts.

        The unknown token may be among them.
        """
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.array(encoding.ids, np.uint32) for encoding in batch]
        for ids in arrays:
            if (special := ids[np.isin(ids, self.special_ids)]).size:
                name = self.backend.id_to_token(int(special[0]))
                raise UsageError(
                    f"a document contains {name}, a name that mpcache uses internally for a "
                    "special token; remove this name from the document"
                )
        return arrays

    def protect(self, value: Any) -> Any:
        """A message in which the names of special tokens are broken up."""
        if isinstance(value, str):
            return self._pattern.sub(lambda m: m[0][:1] + _BREAK + m[0][1:], value)
        if isinstance(value, dict):
            return {key: self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        return value

    def rename_specials(self, rendered: str) -> str:
        """The template's output for protected messages, as `encode_chats` takes it."""
        return self._pattern.sub(lambda m: self.names[m[0]], rendered).replace(_BREAK, "")

    def encode_chats(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokens of chats after `rename_specials`, with their offsets."""
        return self.backend.encode_batch(list(texts), add_special_tokens=False)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class ParsingTextTokenizer:
    """Texts -> token ids, with names of special tokens read as these tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[UInt32[np.ndarray, " _"]]:
        """Token ids of texts."""
        # verbose=False: no warning of documents longer than the context; packing cuts documents
        ids = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return [np.array(text_ids, np.uint32) for text_ids in ids]

    def protect(self, value: Any) -> Any:
        """The message unchanged."""
        return value

    def rename_specials(self, rendered: str) -> str:
        """The text unchanged."""
        return rendered

    def encode_chats(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokens of rendered chats, with their offsets."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    @functools.cached_property
    def _backend(self) -> Tokenizer:
        """A copy, because calls of the tokenizer change its truncation and padding."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        splits = getattr(self.tokenizer, "split_special_tokens", False)
        backend.encode_special_tokens = bool(splits)
        return backend


def special_names(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> list[str]:
    """Names of all special tokens, except single characters, which are ordinary text."""
    names = [str(name) for name in tokenizer.all_special_tokens]
    names += [token["content"] for token in state["added_tokens"] if token["special"]]
    return [name for name in dict.fromkeys(names) if len(name) > 1]


def _hidden_name(name: str) -> str:
    # lower-case letters and digits, which no normalizer changes
    return hashlib.sha256(f"mpcache special token {name}".encode()).hexdigest()


def _renamed(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The state of a tokenizer with some tokens renamed."""
    model = dict(state["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(name, name): i for name, i in vocab.items()}
    else:  # Unigram: pieces with scores
        model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [m for m in model["merges"] if not _touches_special(m, names, prefix)]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [{**t, "content": names.get(t["content"], t["content"])} for t in state["added_tokens"]]
    # the post-processor only adds special tokens or trims offsets: neither is wanted
    unused = dict.fromkeys(("post_processor", "truncation", "padding"))
    return {**state, **unused, "model": model, "added_tokens": added}


def _touches_special(merge: Any, names: dict[str, str], prefix: str) -> bool:
    """Whether a merge takes or makes a special token's name."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return bool({left, right, left + right.removeprefix(prefix)} & names.keys())


def _unknown_id(state: dict[str, Any]) -> int | None:
    """The id of the unknown token."""
    model = state["model"]
    if isinstance(model["vocab"], dict):
        name = model.get("unk_token")
        return None if name is None else model["vocab"].get(name)
    unknown: int | None = model.get("unk_id")
    return unknown
