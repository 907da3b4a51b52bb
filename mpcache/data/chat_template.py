"""Conversations -> tokens through the chat template, with a flag for tokens of the assistant.

A template with `{% generation %}` marks names the assistant's text itself. With other templates the
conversation is rendered again with a probe in place of an assistant's message, and the difference
is the message. The token that ends an assistant's turn belongs to the assistant as well.
"""

import datetime
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt32
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from mpcache.data.conversation import Conversation
from mpcache.data.text_tokenizer import LiteralTextTokenizer, ParsingTextTokenizer
from mpcache.errors import UsageError, first_line
from mpcache.untrusted_names import user_path

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"the date that templates write as today: rows must not depend on the clock"
_PROBE = hashlib.sha256(b"mpcache probe").hexdigest()
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class ChatTokens:
    """One conversation's tokens."""

    ids: UInt32[np.ndarray, " _"]
    by_assistant: Bool[np.ndarray, " _"]
    is_ended: bool
    "the template itself has written the end token at the end, before white space at most"


def load_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> str:
    """The chat template in the file; None takes the tokenizer's own template.

    Raises UsageError for a missing or invalid template.
    """
    if file is not None:
        template = _read(user_path(file))
    else:
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UsageError(
                "the dataset holds chat messages, but the tokenizer has no chat template; give "
                "a Jinja file with --chat-template"
            ) from error
    try:
        _compile_jinja_template(template)
    except Exception as error:  # a template is foreign code
        where = file or "the tokenizer's chat template"
        raise UsageError(
            f"{where} is not a valid chat template: {_reason(error)}; correct the template, or "
            "give another file with --chat-template"
        ) from error
    return template


def _read(file: Path) -> str:
    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"chat_template {file} cannot be read: {reason}; give a readable UTF-8 file with "
            "--chat-template"
        ) from error
    if not template.strip():
        raise UsageError(f"chat_template {file} is empty; give a file with a Jinja template")
    return template


def template_digest(template: str) -> str:
    """sha256 of a chat template, for the identity of a store."""
    return hashlib.sha256(template.encode()).hexdigest()


class ChatTokenizer:
    """Conversations -> tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        text: LiteralTextTokenizer | ParsingTextTokenizer,
    ) -> None:
        self.template, self.text = template, text
        self.specials: dict[str, Any] = dict(tokenizer.special_tokens_map)
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.end_of_turn = re.compile(rf"\s*(?:{'|'.join(map(re.escape, added)) or '(?!)'})")
        self.has_marks = _MARKS.search(template) is not None
        compiled = _compile_jinja_template(template)
        compiled.globals["strftime_now"] = TEMPLATE_DATE.strftime

    def __call__(self, batch: Sequence[Conversation], end: str | None) -> list[ChatTokens]:
        """Tokens of conversations. `end` is the name of the end token.

        Raises UsageError, which names the row, if the template rejects the messages.
        """
        texts, spans, is_ended = [], [], []
        for conversation in batch:
            try:
                chat = _Chat(self, conversation)
                text, text_spans = self._renamed(chat.text, chat.spans())
            except UsageError as error:
                raise UsageError(f"{conversation.where}: {error}") from error
            texts.append(text)
            spans.append(text_spans)
            is_ended.append(end is not None and chat.text.rstrip().endswith(end))
        return [
            ChatTokens(np.array(encoding.ids, np.uint32), _within(encoding.offsets, own), ended)
            for encoding, own, ended in zip(
                self.text.encode_chats(texts), spans, is_ended, strict=True
            )
        ]

    def render(
        self, messages: Sequence[Message], *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The template's output, and the spans that it marks as the assistant's."""
        try:
            result: Any = render_jinja_template(  # its annotation is wrong
                conversations=[[dict(message) for message in messages]],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_marks,
                add_generation_prompt=prompt,
                **self.specials,
            )
        except Exception as error:  # a template is foreign code
            raise UsageError(
                f"the chat template rejects these messages: {_reason(error)}; change the "
                "messages, or give another --chat-template"
            ) from error
        (written,), marks = result
        return written, [(int(start), int(stop)) for spans in marks for start, stop in spans]

    def _renamed(self, text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """The text with its special tokens renamed, and the same spans in it."""
        pieces, renamed_spans, position, size = list[str](), list[Span](), 0, 0
        for start, stop in spans:
            before = self.text.rename_specials(text[position:start])
            inside = self.text.rename_specials(text[start:stop])
            pieces += [before, inside]
            renamed_spans.append((size + len(before), size + len(before) + len(inside)))
            position, size = stop, renamed_spans[-1][1]
        return "".join([*pieces, self.text.rename_specials(text[position:])]), renamed_spans


class _Chat:
    """One conversation, rendered by the template."""

    def __init__(self, encoder: ChatTokenizer, conversation: Conversation) -> None:
        self.encoder = encoder
        messages = [_plain(message) for message in conversation.messages]
        self.messages: list[dict[str, Any]] = encoder.text.protect(messages)
        self.text, self.marks = encoder.render(self.messages)
        self._check_all_written()

    def spans(self) -> list[Span]:
        """The spans of the assistant's text, in order."""
        if self.encoder.has_marks:
            return sorted(self.marks)
        turns = (i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        return [self._turn(i) for i in turns]

    def _turn(self, i: int) -> Span:
        before, after = self._around(i)
        start, stop = len(before), len(self.text) - len(after)
        is_plain = self.text.startswith(before) and self.text.endswith(after) and start <= stop
        if not is_plain:  # the message changes more than its content, such as thinking
            start, stop = self._difference(i, before, after)
        closing = _common_start(self._closing(i), self.text[stop:])
        ended = self.encoder.end_of_turn.match(closing)
        return start, stop + (ended.end() if ended else 0)

    def _around(self, i: int) -> tuple[str, str]:
        """The template's output before and after the content of an assistant's message."""
        bare = {"role": "assistant", "content": _PROBE}
        for probe in (bare, {**self.messages[i], "content": _PROBE}):
            try:
                written = self._rendered_with(i, probe)
            except UsageError:  # such as a template in which a tool's answer must follow a call
                continue
            if written.count(_PROBE) == 1:
                before, _, after = written.partition(_PROBE)
                return before, after
        raise UsageError(_unmatched(i))

    def _difference(self, i: int, before: str, after: str) -> Span:
        start = len(_common_start(self.text, before))
        stop = len(self.text) - len(_common_start(self.text[:start:-1], after[::-1]))
        earlier, prompt = self._rendered_before(i), self._rendered_before(i, prompt=True)
        if len(prompt) > len(earlier) and self.text.startswith(prompt) and len(prompt) <= start:
            start = len(prompt)
        content = str(self.messages[i].get("content") or "").rsplit("</think>")[-1].strip()
        is_early = self.text.startswith(earlier) and start < len(earlier)
        if is_early or content not in self.text[start:stop]:
            raise UsageError(_unmatched(i))
        return start, stop

    def _rendered_with(self, i: int, message: Message) -> str:
        """The template's output with message `i` replaced."""
        return self.encoder.render([*self.messages[:i], message, *self.messages[i + 1 :]])[0]

    def _closing(self, i: int) -> str:
        """The template's output after an assistant's message that ends a conversation."""
        last = {"role": "assistant", "content": _PROBE}
        try:
            written, _ = self.encoder.render([*self.messages[:i], last])
        except UsageError:
            return ""
        return written.rpartition(_PROBE)[2] if _PROBE in written else ""

    def _rendered_before(self, i: int, *, prompt: bool = False) -> str:
        try:
            return self.encoder.render(self.messages[:i], prompt=prompt)[0] if i else ""
        except UsageError:
            return ""

    def _check_all_written(self) -> None:
        """Raise UsageError where the template silently leaves out a message."""
        for i, message in enumerate(self.messages):
            if message.get("tool_calls") and "tool_calls" not in self.encoder.template:
                raise UsageError(
                    f"the chat template ignores tool_calls, but message {i + 1} has tool_calls; "
                    "give another --chat-template"
                )
            content = str(message.get("content") or "").strip()
            if message["role"] == "assistant" or content in self.text:
                continue
            probe = {**message, "content": _PROBE}
            if _PROBE not in self._rendered_with(i, probe):
                raise UsageError(
                    f"the chat template ignores message {i + 1}, which has the role "
                    f"{message['role']}; remove this message from the data, or give another "
                    "--chat-template"
                )


def _plain(message: Message) -> dict[str, Any]:
    """A message without its null fields. Its content is a text already."""
    fields = {key: value for key, value in message.items() if value is not None}
    return {"content": "", **fields}


def _within(offsets: Sequence[Span], spans: Sequence[Span]) -> Bool[np.ndarray, " _"]:
    """Whether a token has a character in one of the spans."""
    start, stop = np.array(offsets, np.int64).reshape(-1, 2).T
    is_within = np.zeros(len(start), np.bool_)
    for first, last in spans:
        is_within |= (start < last) & (stop > first) & (first < last)
    return is_within


def _common_start(first: str, second: str) -> str:
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))]


def _unmatched(i: int) -> str:
    return (
        f"what the assistant wrote in message {i + 1} cannot be found in what the chat template "
        "writes; give a --chat-template with {% generation %} marks"
    )


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return first_line(error) if line is None else f"line {line}: {first_line(error)}"
