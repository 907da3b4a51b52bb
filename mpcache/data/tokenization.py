"""Documents -> streams of tokens, each with the special tokens that its document gets.

Where a store has token_flags, a stream holds flags too: an item is `token | flags << 32`, so that
packing cuts both alike.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt, UInt32
from transformers import PreTrainedTokenizerBase

from mpcache.config import CollectConfig
from mpcache.data.chat_template import ChatEncoder, ChatTokens, find_template, template_digest
from mpcache.data.conversation import Conversation
from mpcache.data.document_codec import Document
from mpcache.data.documents import Documents
from mpcache.data.text_tokenizer import ParsedText, PlainText
from mpcache.data.token_file import TokenIds, Tokenizer
from mpcache.errors import UsageError
from mpcache.store.format import BY_ASSISTANT

Stream = UInt[np.ndarray, " _"]
FLAG_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class Specials:
    """The special tokens that packing puts in; None where it puts none."""

    begin: int | None
    begins: Literal["document", "sequence"]
    "what `begin` begins"
    end: int | None
    "ends each document"


def has_flags(documents: Documents, config: CollectConfig) -> bool:
    """Whether tokens are stored with flags."""
    return documents.kind == "conversations" or config.one_document_per_sequence


def template_of(documents: Documents, tokenizer: Tokenizer, config: CollectConfig) -> str | None:
    """The chat template, where the documents are conversations.

    Raises UsageError where conversations cannot be read so.
    """
    if documents.kind != "conversations":
        if config.chat_template is not None:
            raise UsageError(
                "chat_template is for chat messages, got a dataset without; leave it out, or name "
                "the column of messages with --text-column"
            )
        return None
    if not (config.cross_document_attention or config.one_document_per_sequence):
        raise UsageError(
            "conversations cannot be kept apart within a sequence: end tokens stand within them; "
            "use --one-document-per-sequence"
        )
    # a dataset of conversations is refused where there is no tokenizer
    assert not isinstance(tokenizer, TokenIds)
    return find_template(tokenizer, config.chat_template)


def template_digests(template: str | None) -> dict[str, str]:
    """What the identity says of the chat template."""
    return {} if template is None else {"chat_template": template_digest(template)}


class Encoder:
    """Documents -> their streams; None of a document without tokens of its own.

    A conversation gets no begin or end token that its template wrote already.
    """

    def __init__(
        self, tokenizer: Tokenizer, specials: Specials, config: CollectConfig,
        documents: Documents, template: str | None = None,
    ) -> None:  # fmt: skip
        """Without a `template` that of the config is taken."""
        self.tokenizer, self.specials, self.template = tokenizer, specials, template
        begins = specials.begin is not None and specials.begins == "document"
        dtype = np.uint64 if has_flags(documents, config) else np.uint32
        self.head = np.array([specials.begin] if begins else [], dtype)
        self.tail = np.array([] if specials.end is None else [specials.end], dtype)
        self.largest_id = documents.largest_id
        self.keeps_empty, self.config = config.keep_empty_documents, config

    @property
    def _of_text(self) -> PreTrainedTokenizerBase:
        """The tokenizer; where there is none, a dataset of texts or conversations is refused."""
        assert not isinstance(self.tokenizer, TokenIds)
        return self.tokenizer

    @functools.cached_property
    def text(self) -> PlainText | ParsedText:
        parses = self.config.parse_special_tokens
        return ParsedText(self._of_text) if parses else PlainText(self._of_text)

    @functools.cached_property
    def chat(self) -> ChatEncoder:
        template = self.template or find_template(self._of_text, self.config.chat_template)
        return ChatEncoder(self._of_text, template, self.text)

    def __call__(self, batch: Sequence[Document]) -> list[Stream | None]:
        empty = self._whole(np.empty(0, np.uint32)) if self.keeps_empty else None
        streams = [empty] * len(batch)
        encoders: tuple[tuple[type, Callable[[Any], list[Stream | None]]], ...] = (
            (str, self._texts),
            (Conversation, self._chats),
            (np.ndarray, self._ids),
        )
        for kind, encode in encoders:
            indices = [i for i, document in enumerate(batch) if isinstance(document, kind)]
            encoded = encode([batch[i] for i in indices]) if indices else []
            for i, stream in zip(indices, encoded, strict=True):
                streams[i] = empty if stream is None else stream
        return streams

    def _texts(self, texts: Sequence[str]) -> list[Stream | None]:
        encoded = self.text.encode(texts)
        for ids in encoded:
            self._refuse_beyond(ids, "a text of the dataset")
        return self._ids(encoded)

    def _ids(self, documents: Sequence[Stream]) -> list[Stream | None]:
        return [self._whole(ids) if len(ids) else None for ids in documents]

    def _chats(self, chats: Sequence[Conversation]) -> list[Stream | None]:
        end = self.specials.end
        name = None if end is None else str(self._of_text.convert_ids_to_tokens(end))
        written = iter(self.chat([chat for chat in chats if chat.messages], name))
        tokens = [next(written) if chat.messages else None for chat in chats]
        for chat, one in zip(chats, tokens, strict=True):
            if one:
                self._refuse_beyond(one.ids, chat.where)
        return [self._whole_chat(one) if one and len(one.ids) else None for one in tokens]

    def _refuse_beyond(self, ids: UInt32[np.ndarray, " _"], where: str) -> None:
        """Raise UsageError for a token without an embedding, as a special one may be."""
        largest = self.largest_id
        if largest is not None and len(ids) and (worst := int(ids.max())) > largest:
            name = self._of_text.convert_ids_to_tokens(worst)
            raise UsageError(
                f"{where} has the token {name!r}, {worst}, and the embedding of "
                f"{self.config.model} ends at {largest}; resize the model for its tokenizer, "
                "or use the model's own tokenizer and chat template"
            )

    def _whole(self, ids: Stream) -> Stream:
        return np.concatenate([self.head, ids.astype(self.head.dtype), self.tail])

    def _whole_chat(self, one: ChatTokens) -> Stream:
        ids = one.ids.astype(np.uint64)
        items = ids | one.by_assistant.astype(np.uint64) * BY_ASSISTANT << FLAG_SHIFT
        is_begun = len(self.head) > 0 and ids[0] == self.head[0]
        tail = self.tail[:0] if one.is_ended else self.tail
        return np.concatenate([self.head[:0] if is_begun else self.head, items, tail])
