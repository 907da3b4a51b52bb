"""A tokenizer that reads a text as text: the name of a special token in it is not that token.

Added tokens would be searched in the text first; `encode_special_tokens` of `tokenizers` turns that
off, but a model of pieces or words may still know a special token's name as one of its own. So the
special tokens are respelled instead, everywhere in the tokenizer: to names that no text contains.
All else, ids too, stays. A chat template's own markers are respelled alike before they are read.
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
"stands within the name of a special token in a message, until the template has written its own"


class PlainText:
    """Texts -> token ids, none of them special."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UsageError where the special tokens of this tokenizer cannot be respelled."""
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.names = {name: _respelled(name) for name in special_names(tokenizer, state)}
        "of each special token the new one"
        self.backend = Tokenizer.from_str(json.dumps(_renamed(state, self.names)))
        self.unknown = _unknown_id(state)
        before, after = tokenizer.backend_tokenizer.token_to_id, self.backend.token_to_id
        if any(before(old) != after(new) for old, new in self.names.items()):
            raise UsageError(
                f"the special tokens of {type(tokenizer).__name__} cannot be told from text; "
                "use --parse-special-tokens"
            )
        ids = {before(name) for name in self.names} - {self.unknown, None}
        self.special_ids = np.array(sorted(ids), np.uint32)

    def encode(self, texts: Sequence[str]) -> list[UInt32[np.ndarray, " _"]]:
        """Token ids of texts.

        An unknown token may be among them: it stands for what the tokenizer does not know.
        """
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [np.array(one.ids, np.uint32) for one in batch]
        for ids in found:
            if np.isin(ids, self.special_ids).any():
                raise UsageError("a text holds the name that a special token has here; change it")
        return found

    def marked(self, value: Any) -> Any:
        """Values of messages in which names of special tokens are interrupted."""
        if isinstance(value, str):
            return self._pattern.sub(lambda m: m[0][:1] + _BREAK + m[0][1:], value)
        if isinstance(value, dict):
            return {key: self.marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(item) for item in value]
        return value

    def respelled(self, rendered: str) -> str:
        """What a template wrote of marked messages, for `encode_chats`."""
        return self._pattern.sub(lambda m: self.names[m[0]], rendered).replace(_BREAK, "")

    def encode_chats(self, respelled: Sequence[str]) -> list[Encoding]:
        """Tokens of respelled chats, with their offsets."""
        return self.backend.encode_batch(list(respelled), add_special_tokens=False)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class ParsedText:
    """Texts -> token ids, where the name of a special token is that token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[UInt32[np.ndarray, " _"]]:
        """Token ids of texts."""
        # verbose=False: it would warn of documents longer than the model's context, which we cut
        ids = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return [np.array(one, np.uint32) for one in ids]

    def marked(self, value: Any) -> Any:
        """The same value: its special tokens are parsed."""
        return value

    def respelled(self, rendered: str) -> str:
        """The same text."""
        return rendered

    def encode_chats(self, respelled: Sequence[str]) -> list[Encoding]:
        """Tokens of rendered chats, with their offsets."""
        return self._backend.encode_batch(list(respelled), add_special_tokens=False)

    @functools.cached_property
    def _backend(self) -> Tokenizer:
        """A copy: calls of the tokenizer change truncation, padding and more of its own."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        splits = getattr(self.tokenizer, "split_special_tokens", False)
        backend.encode_special_tokens = bool(splits)
        return backend


def special_names(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> list[str]:
    """Names of all special tokens; a lone character is ordinary text, whatever it is used for."""
    names = [str(name) for name in tokenizer.all_special_tokens]
    names += [token["content"] for token in state["added_tokens"] if token["special"]]
    return [name for name in dict.fromkeys(names) if len(name) > 1]


def _respelled(name: str) -> str:
    # lower-case letters and digits: normalizers leave them as they are
    return hashlib.sha256(f"mpcache special token {name}".encode()).hexdigest()


def _renamed(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The same tokenizer with other names of some tokens."""
    model = dict(state["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(name, name): i for name, i in vocab.items()}
    else:  # of Unigram: pieces with their scores
        model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [m for m in model["merges"] if not _makes(m, names, prefix)]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [{**t, "content": names.get(t["content"], t["content"])} for t in state["added_tokens"]]
    # the last step only adds special tokens, or trims offsets: neither is wanted
    unused = dict.fromkeys(("post_processor", "truncation", "padding"))
    return {**state, **unused, "model": model, "added_tokens": added}


def _makes(merge: Any, names: dict[str, str], prefix: str) -> bool:
    """Whether a merge joins parts of a special token's name, or makes it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return bool({left, right, left + right.removeprefix(prefix)} & names.keys())


def _unknown_id(state: dict[str, Any]) -> int | None:
    """The token that stands for what the tokenizer's model does not know."""
    model = state["model"]
    if isinstance(model["vocab"], dict):
        name = model.get("unk_token")
        return None if name is None else model["vocab"].get(name)
    unknown: int | None = model.get("unk_id")
    return unknown
