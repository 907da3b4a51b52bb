"""Conversations -> tokens through the chat template, and which of them the assistant wrote.

A template says so itself by `{% generation %}` marks. With another template the conversation is
written once more with a probe in place of an assistant's message: what differs is the message. The
token that ends the assistant's turn, if there is one, is the assistant's too.
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
from mpcache.data.text_tokenizer import ParsedText, PlainText
from mpcache.errors import UsageError
from mpcache.hub import first_line
from mpcache.validation import user_path

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
"what a template that writes the date of today writes: rows depend on no clock"
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
    "the template wrote the end token itself, as the last thing but white space"


def find_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> str:
    """The chat template: that of the file, else the tokenizer's own.

    Raises UsageError where there is none, or it is no template.
    """
    if file is not None:
        template = _read(user_path(file))
    else:
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UsageError(
                "chat messages need a chat template, the tokenizer has none; give --chat-template"
            ) from error
    try:
        _compile_jinja_template(template)
    except Exception as error:  # a template is foreign code
        where = file or "the tokenizer's chat template"
        raise UsageError(f"{where} is no chat template: {_fault(error)}; repair it") from error
    return template


def _read(file: Path) -> str:
    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UsageError(f"chat_template {file} cannot be read: {why}; check the file") from error
    if not template.strip():
        raise UsageError(f"chat_template {file} is empty; give a Jinja template")
    return template


def template_digest(template: str) -> str:
    """What the identity of a store says of its chat template."""
    return hashlib.sha256(template.encode()).hexdigest()


class ChatEncoder:
    """Conversations -> tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, text: PlainText | ParsedText
    ) -> None:
        self.template, self.text = template, text
        self.specials: dict[str, Any] = dict(tokenizer.special_tokens_map)
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.end_of_turn = re.compile(rf"\s*(?:{'|'.join(map(re.escape, added)) or '(?!)'})")
        self.has_marks = _MARKS.search(template) is not None
        compiled = _compile_jinja_template(template)
        compiled.globals["strftime_now"] = TEMPLATE_DATE.strftime

    def __call__(self, batch: Sequence[Conversation], end: str | None) -> list[ChatTokens]:
        """Tokens of conversations; `end` is the name of the end token.

        Raises UsageError, which names the row, where the template does not take the messages.
        """
        texts, spans, is_ended = [], [], []
        for conversation in batch:
            try:
                chat = _Chat(self, conversation)
                cut, own = self._respelled(chat.whole, chat.spans())
            except UsageError as error:
                raise UsageError(f"{conversation.where}: {error}") from error
            texts.append(cut)
            spans.append(own)
            is_ended.append(end is not None and chat.whole.rstrip().endswith(end))
        return [
            ChatTokens(np.array(one.ids, np.uint32), _within(one.offsets, own), ended)
            for one, own, ended in zip(self.text.encode_chats(texts), spans, is_ended, strict=True)
        ]

    def render(
        self, messages: Sequence[Message], *, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """What the template writes, and the spans that it marks as the assistant's."""
        try:
            result: Any = render_jinja_template(  # annotated as if it gave a text
                conversations=[[dict(message) for message in messages]],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_marks,
                add_generation_prompt=prompt,
                **self.specials,
            )
        except Exception as error:  # a template is foreign code
            raise UsageError(
                f"the chat template does not take these messages: {_fault(error)}; "
                "change them, or give another --chat-template"
            ) from error
        (written,), marks = result
        return written, [(int(start), int(stop)) for spans in marks for start, stop in spans]

    def _respelled(self, whole: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """The text as it is read, with the same spans in it."""
        pieces, own, at, size = list[str](), list[Span](), 0, 0
        for start, stop in spans:
            before = self.text.respelled(whole[at:start])
            inside = self.text.respelled(whole[start:stop])
            pieces += [before, inside]
            own.append((size + len(before), size + len(before) + len(inside)))
            at, size = stop, own[-1][1]
        return "".join([*pieces, self.text.respelled(whole[at:])]), own


class _Chat:
    """One conversation as the template writes it."""

    def __init__(self, encoder: ChatEncoder, conversation: Conversation) -> None:
        self.encoder = encoder
        messages = [_plain(message) for message in conversation.messages]
        self.messages: list[dict[str, Any]] = encoder.text.marked(messages)
        self.whole, self.marks = encoder.render(self.messages)
        self._refuse_unwritten()

    def spans(self) -> list[Span]:
        """Where the assistant's words are, in order."""
        if self.encoder.has_marks:
            return sorted(self.marks)
        turns = (i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        return [self._turn(i) for i in turns]

    def _turn(self, i: int) -> Span:
        before, after = self._around(i)
        start, stop = len(before), len(self.whole) - len(after)
        is_plain = self.whole.startswith(before) and self.whole.endswith(after) and start <= stop
        if not is_plain:  # more depends on the message than its content, such as thinking
            start, stop = self._difference(i, before, after)
        closing = _common_start(self._closing(i), self.whole[stop:])
        ended = self.encoder.end_of_turn.match(closing)
        return start, stop + (ended.end() if ended else 0)

    def _around(self, i: int) -> tuple[str, str]:
        """What the template writes before and after an assistant's words."""
        lone = {"role": "assistant", "content": _PROBE}
        for probe in (lone, {**self.messages[i], "content": _PROBE}):
            try:
                written = self._with(i, probe)
            except UsageError:  # say, a tool's answer must follow a call
                continue
            if written.count(_PROBE) == 1:
                before, _, after = written.partition(_PROBE)
                return before, after
        raise UsageError(_unmatched(i))

    def _difference(self, i: int, before: str, after: str) -> Span:
        start = len(_common_start(self.whole, before))
        stop = len(self.whole) - len(_common_start(self.whole[:start:-1], after[::-1]))
        earlier, prompt = self._rendered(i), self._rendered(i, prompt=True)
        if len(prompt) > len(earlier) and self.whole.startswith(prompt) and len(prompt) <= start:
            start = len(prompt)
        content = str(self.messages[i].get("content") or "").rsplit("</think>")[-1].strip()
        is_early = self.whole.startswith(earlier) and start < len(earlier)
        if is_early or content not in self.whole[start:stop]:
            raise UsageError(_unmatched(i))
        return start, stop

    def _with(self, i: int, message: Message) -> str:
        """The conversation with another message at a place."""
        return self.encoder.render([*self.messages[:i], message, *self.messages[i + 1 :]])[0]

    def _closing(self, i: int) -> str:
        """What the template writes behind an assistant's words at the end of a conversation."""
        last = {"role": "assistant", "content": _PROBE}
        try:
            written, _ = self.encoder.render([*self.messages[:i], last])
        except UsageError:
            return ""
        return written.rpartition(_PROBE)[2] if _PROBE in written else ""

    def _rendered(self, i: int, *, prompt: bool = False) -> str:
        try:
            return self.encoder.render(self.messages[:i], prompt=prompt)[0] if i else ""
        except UsageError:
            return ""

    def _refuse_unwritten(self) -> None:
        """Raise UsageError where the template leaves a message out without a word."""
        for i, message in enumerate(self.messages):
            if message.get("tool_calls") and "tool_calls" not in self.encoder.template:
                raise UsageError(
                    f"the chat template does not write tool_calls, got some in message {i + 1}; "
                    "give another --chat-template"
                )
            content = str(message.get("content") or "").strip()
            if message["role"] == "assistant" or content in self.whole:
                continue
            probe = {**message, "content": _PROBE}
            if _PROBE not in self._with(i, probe):
                raise UsageError(
                    f"the chat template leaves out message {i + 1}, of role {message['role']}; "
                    "leave it out of the data, or give another --chat-template"
                )


def _plain(message: Message) -> dict[str, Any]:
    """A message without fields that are null; its content is a text already."""
    fields = {key: value for key, value in message.items() if value is not None}
    return {"content": "", **fields}


def _within(offsets: Sequence[Span], spans: Sequence[Span]) -> Bool[np.ndarray, " _"]:
    """Tokens that have a character in one of the spans."""
    start, stop = np.array(offsets, np.int64).reshape(-1, 2).T
    found = np.zeros(len(start), np.bool_)
    for first, last in spans:
        found |= (start < last) & (stop > first) & (first < last)
    return found


def _common_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _unmatched(i: int) -> str:
    return (
        f"what the assistant wrote in message {i + 1} cannot be found in what the chat template "
        "writes; give a --chat-template with {% generation %} marks"
    )


def _fault(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return first_line(error) if line is None else f"line {line}: {first_line(error)}"
