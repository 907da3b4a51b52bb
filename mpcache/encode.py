"""Documents -> streams of tokens, each with the special tokens that its document gets.

Where a store has token_flags, a stream holds flags too: an item is `token | flags << 32`, so that
packing cuts both alike.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt
from transformers import PreTrainedTokenizerBase

from mpcache.chat import ChatEncoder, ChatTokens, find_template, template_digest
from mpcache.config import CollectConfig
from mpcache.conversation import Conversation
from mpcache.documents import Document, Documents
from mpcache.format import BY_ASSISTANT
from mpcache.plain_text import ParsedText, PlainText

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


def template_of(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, config: CollectConfig
) -> str | None:
    """The chat template, where the documents are conversations.

    Raises ValueError where conversations cannot be read so.
    """
    if documents.kind != "conversations":
        if config.chat_template is not None:
            raise ValueError(
                "chat_template is for chat messages, got a dataset without; leave it out, or name "
                "the column of messages with --text-column"
            )
        return None
    if not (config.cross_document_attention or config.one_document_per_sequence):
        raise ValueError(
            "conversations cannot be kept apart within a sequence: end tokens stand within them; "
            "use --one-document-per-sequence"
        )
    return find_template(tokenizer, config.chat_template)


def template_digests(template: str | None) -> dict[str, str]:
    """What the identity says of the chat template."""
    return {} if template is None else {"chat_template": template_digest(template)}


class Encoder:
    """Documents with their places -> their streams; None of a document without tokens of its own.

    A conversation gets no begin or end token that its template wrote already.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, specials: Specials, config: CollectConfig,
        documents: Documents, template: str | None = None,
    ) -> None:  # fmt: skip
        """Without a `template` that of the config is taken."""
        self.tokenizer, self.specials, self.template = tokenizer, specials, template
        begins = specials.begin is not None and specials.begins == "document"
        dtype = np.uint64 if has_flags(documents, config) else np.uint32
        self.head = np.array([specials.begin] if begins else [], dtype)
        self.tail = np.array([] if specials.end is None else [specials.end], dtype)
        self.keeps_empty, self.config = config.keep_empty_documents, config

    @functools.cached_property
    def text(self) -> PlainText | ParsedText:
        parses = self.config.parse_special_tokens
        return ParsedText(self.tokenizer) if parses else PlainText(self.tokenizer)

    @functools.cached_property
    def chat(self) -> ChatEncoder:
        template = self.template or find_template(self.tokenizer, self.config.chat_template)
        return ChatEncoder(self.tokenizer, template, self.text)

    def __call__(self, batch: Sequence[tuple[int, Document]]) -> list[Stream | None]:
        documents = dict(batch)
        whole: dict[int, Stream] = {}
        texts = {place: one for place, one in batch if isinstance(one, str)}
        if texts:
            encoded = zip(texts, self.text.encode(list(texts.values())), strict=True)
            whole |= {place: self._whole(ids) for place, ids in encoded if len(ids)}
        chats = [(p, one) for p, one in batch if isinstance(one, Conversation) and one.messages]
        if chats:
            end = self.specials.end
            name = None if end is None else str(self.tokenizer.convert_ids_to_tokens(end))
            told = zip(chats, self.chat(chats, name), strict=True)
            whole |= {place: self._whole_chat(one) for (place, _), one in told if len(one.ids)}
        ids = {p: one for p, one in batch if isinstance(one, np.ndarray) and len(one)}
        whole |= {place: self._whole(tokens) for place, tokens in ids.items()}
        empty = self._whole(np.empty(0, np.uint32)) if self.keeps_empty else None
        return [whole.get(place, empty) for place in documents]

    def _whole(self, ids: Stream) -> Stream:
        return np.concatenate([self.head, ids.astype(self.head.dtype), self.tail])

    def _whole_chat(self, one: ChatTokens) -> Stream:
        ids = one.ids.astype(np.uint64)
        items = ids | one.by_assistant.astype(np.uint64) * BY_ASSISTANT << FLAG_SHIFT
        is_begun = len(self.head) > 0 and ids[0] == self.head[0]
        tail = self.tail[:0] if one.is_ended else self.tail
        return np.concatenate([self.head[:0] if is_begun else self.head, items, tail])
