"""Documents -> streams of tokens, with the special tokens that the settings add.

In a store with token_flags, each item of a stream is `token | flags << 32`, so that packing cuts
tokens and flags at the same points.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt, UInt32
from transformers import PreTrainedTokenizerBase

from mpcache.config import CollectConfig
from mpcache.data.chat_template import ChatTokenizer, ChatTokens, load_template, template_digest
from mpcache.data.conversation import Conversation
from mpcache.data.document_codec import Document
from mpcache.data.documents import Documents
from mpcache.data.special_tokens import SpecialTokens
from mpcache.data.text_tokenizer import LiteralTextTokenizer, ParsingTextTokenizer
from mpcache.data.vocabulary import ConfigTokens, Tokenizer
from mpcache.errors import UsageError
from mpcache.store.object_paths import BY_ASSISTANT

Stream = UInt[np.ndarray, " _"]
FLAG_SHIFT = np.uint64(32)


def has_flags(documents: Documents, config: CollectConfig) -> bool:
    """Whether the store needs token_flags."""
    return documents.kind == "conversations" or config.one_document_per_sequence


def find_chat_template(
    documents: Documents, tokenizer: Tokenizer, config: CollectConfig
) -> str | None:
    """The chat template if the documents are conversations, else None.

    Raises UsageError for settings that do not fit the documents, or without a usable template.
    """
    if documents.kind != "conversations":
        if config.chat_template is not None:
            raise UsageError(
                "--chat-template applies only to chat messages, got a dataset of "
                f"{documents.kind}; remove --chat-template, or give the column of messages with "
                "--text-column"
            )
        return None
    if not (config.cross_document_attention or config.one_document_per_sequence):
        raise UsageError(
            "conversations cannot be kept apart within a sequence, because they contain end "
            "tokens; use --one-document-per-sequence"
        )
    # opening a dataset of conversations fails without a tokenizer
    assert not isinstance(tokenizer, ConfigTokens)
    return load_template(tokenizer, config.chat_template)


def chat_template_identity(template: str | None) -> dict[str, str]:
    """The chat template's entry in the identity of a store; empty without a template."""
    return {} if template is None else {"chat_template": template_digest(template)}


class DocumentTokenizer:
    """Documents -> token streams; None for a document without tokens.

    A conversation gets no begin or end token if its template has written that token already.
    """

    def __init__(
        self, tokenizer: Tokenizer, specials: SpecialTokens, config: CollectConfig,
        documents: Documents, template: str | None,
    ) -> None:  # fmt: skip
        """`template` is the chat template; None for documents that are no conversations."""
        self.tokenizer, self.specials, self.template = tokenizer, specials, template
        begins = specials.begin is not None and specials.begins == "document"
        dtype = np.uint64 if has_flags(documents, config) else np.uint32
        self.head = np.array([specials.begin] if begins else [], dtype)
        self.tail = np.array([] if specials.end is None else [specials.end], dtype)
        self.largest_id = documents.largest_id
        self.keeps_empty, self.config = config.keep_empty_documents, config

    @property
    def _text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Opening a dataset of texts or conversations fails without one."""
        assert not isinstance(self.tokenizer, ConfigTokens)
        return self.tokenizer

    @functools.cached_property
    def text(self) -> LiteralTextTokenizer | ParsingTextTokenizer:
        parses = self.config.parse_special_tokens
        return (
            ParsingTextTokenizer(self._text_tokenizer)
            if parses
            else LiteralTextTokenizer(self._text_tokenizer)
        )

    @functools.cached_property
    def chat(self) -> ChatTokenizer:
        assert self.template is not None
        return ChatTokenizer(self._text_tokenizer, self.template, self.text)

    def __call__(self, batch: Sequence[Document]) -> list[Stream | None]:
        empty = self._stream(np.empty(0, np.uint32)) if self.keeps_empty else None
        streams = [empty] * len(batch)
        encoders: tuple[tuple[type, Callable[[Any], list[Stream | None]]], ...] = (
            (str, self._encode_texts),
            (Conversation, self._encode_chats),
            (np.ndarray, self._encode_ids),
        )
        for kind, encode in encoders:
            indices = [i for i, document in enumerate(batch) if isinstance(document, kind)]
            encoded = encode([batch[i] for i in indices]) if indices else []
            for i, stream in zip(indices, encoded, strict=True):
                streams[i] = empty if stream is None else stream
        return streams

    def _encode_texts(self, texts: Sequence[str]) -> list[Stream | None]:
        encoded = self.text.encode(texts)
        for ids in encoded:
            self._check_embedded(ids, "a text of the dataset")
        return self._encode_ids(encoded)

    def _encode_ids(self, documents: Sequence[Stream]) -> list[Stream | None]:
        return [self._stream(ids) if len(ids) else None for ids in documents]

    def _encode_chats(self, chats: Sequence[Conversation]) -> list[Stream | None]:
        end = self.specials.end
        name = None if end is None else str(self._text_tokenizer.convert_ids_to_tokens(end))
        written = iter(self.chat([chat for chat in chats if chat.messages], name))
        tokens = [next(written) if chat.messages else None for chat in chats]
        for chat, chat_tokens in zip(chats, tokens, strict=True):
            if chat_tokens:
                self._check_embedded(chat_tokens.ids, chat.where)
        return [self._chat_stream(t) if t and len(t.ids) else None for t in tokens]

    def _check_embedded(self, ids: UInt32[np.ndarray, " _"], where: str) -> None:
        """Raise UsageError for a token without an embedding, such as an added special token."""
        largest = self.largest_id
        if largest is not None and len(ids) and (worst := int(ids.max())) > largest:
            name = self._text_tokenizer.convert_ids_to_tokens(worst)
            raise UsageError(
                f"{where} has the token {name!r} with id {worst}, but the largest id in the "
                f"embedding of {self.config.model} is {largest}; resize the model's embedding "
                "for its tokenizer, or use the model's own tokenizer and chat template"
            )

    def _stream(self, ids: Stream) -> Stream:
        return np.concatenate([self.head, ids.astype(self.head.dtype), self.tail])

    def _chat_stream(self, chat: ChatTokens) -> Stream:
        ids = chat.ids.astype(np.uint64)
        items = ids | chat.by_assistant.astype(np.uint64) * BY_ASSISTANT << FLAG_SHIFT
        is_begun = len(self.head) > 0 and ids[0] == self.head[0]
        tail = self.tail[:0] if chat.is_ended else self.tail
        return np.concatenate([self.head[:0] if is_begun else self.head, items, tail])
