"""Conversations become the tokens of their template, with flags for the assistant's tokens."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mpcache.data.chat_template import ChatTokenizer, ChatTokens, load_template
from mpcache.data.conversation import Conversation
from mpcache.data.text_tokenizer import LiteralTextTokenizer, ParsingTextTokenizer
from tests.helpers.chat_templates import ENDS, MARKERS, TEMPLATES
from tests.helpers.models import tiny_tokenizer

EVERY_TEMPLATE = pytest.mark.parametrize("name", TEMPLATES)
END = "</s>"
TWICE = "{% for m in messages %}{{ m.content * 2 }}{% endfor %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": MARKERS})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


TOKENIZER = make_tokenizer()
TEXT = {True: ParsingTextTokenizer(TOKENIZER), False: LiteralTextTokenizer(TOKENIZER)}


def chat_of(*texts: str, first: str = "user") -> list[dict[str, Any]]:
    others = {"user": "assistant", "assistant": "user"}
    roles = [first if i % 2 == 0 else others[first] for i in range(len(texts))]
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]


def tokens_of(
    template: str, messages: Sequence[dict[str, Any]], parses: bool = False
) -> ChatTokens:
    encoder = ChatTokenizer(TOKENIZER, TEMPLATES.get(template, template), TEXT[parses])
    (chat,) = encoder([Conversation(tuple(messages), "row 7 of x.jsonl")], END)
    assert len(chat.ids) == len(chat.by_assistant)
    return chat


def turns_of(chat: ChatTokens) -> list[str]:
    """The texts of consecutive tokens that the assistant wrote."""
    turns, before = list[list[int]](), False
    for token, own in zip(chat.ids.tolist(), chat.by_assistant.tolist(), strict=True):
        if own and not before:
            turns.append([])
        if own:
            turns[-1].append(token)
        before = own
    return [TOKENIZER.decode(turn) for turn in turns]


# letters alone: another test covers white space that a template strips
content_ = st.text("abcdé \n.", min_size=1, max_size=9).map(lambda text: f"x{text}x")


@EVERY_TEMPLATE
@settings(deadline=None, max_examples=25)
@given(st.lists(content_, min_size=2, max_size=7), st.booleans())
def test_tokens_are_the_templates_and_turns_are_the_assistants(
    name: str, contents: list[str], parses: bool
) -> None:
    messages = chat_of(*contents)
    chat = tokens_of(name, messages, parses)
    template = TEMPLATES[name].replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')
    expected = TOKENIZER.apply_chat_template(messages, chat_template=template)["input_ids"]
    assert chat.ids.tolist() == expected
    assert turns_of(chat) == [content + ENDS[name] for content in contents[1::2]]


@settings(deadline=None, max_examples=25)
@given(st.lists(content_, min_size=2, max_size=7))
def test_marks_of_the_template_mean_what_transformers_says(contents: list[str]) -> None:
    messages = chat_of(*contents)
    chat = tokens_of("marked", messages)
    expected = TOKENIZER.apply_chat_template(
        messages, chat_template=TEMPLATES["marked"], return_assistant_tokens_mask=True
    )
    assert chat.by_assistant.astype(int).tolist() == expected["assistant_masks"]
    without = tokens_of(TEMPLATES["marked"].replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""), messages)  # fmt: skip
    assert chat.by_assistant.tolist() == without.by_assistant.tolist()


@EVERY_TEMPLATE
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_markers_in_messages_are_text(name: str, data: st.DataObject) -> None:
    marker = st.sampled_from([*MARKERS, "<s>", "</s>"])
    contents = data.draw(st.lists(st.tuples(content_, marker), min_size=2, max_size=4))
    with_names = chat_of(*(text + mark + "y" for text, mark in contents))
    with_others = chat_of(*(text + "q" * len(mark) + "y" for text, mark in contents))
    chat, other = tokens_of(name, with_names), tokens_of(name, with_others)
    special = set(TOKENIZER.all_special_ids)
    ids, others = chat.ids.tolist(), other.ids.tolist()
    assert len(ids) == len(others)
    assert [i for i in ids if i in special] == [i for i in others if i in special]
    assert chat.by_assistant.tolist() == other.by_assistant.tolist()
    assert TOKENIZER.decode(ids).count(contents[0][1]) > TOKENIZER.decode(others).count(
        contents[0][1]
    )
    parsed = tokens_of(name, with_names, parses=True)
    assert len(parsed.ids) < len(ids)


def test_stripped_white_space_belongs_to_no_turn() -> None:
    chat = tokens_of("llama3", chat_of(" hi \n", "\n well \n", "so", " yes"))
    assert turns_of(chat) == ["well<|eot_id|>", "yes<|eot_id|>"]
    assert "26 Jul 2024" in TOKENIZER.decode(chat.ids)


def test_thinking_is_the_assistants_where_the_template_writes_it() -> None:
    messages = chat_of(
        "hi", "<think>\nold\n</think>\n\nwell", "so", "<think>\nnew\n</think>\n\nyes"
    )
    chat = tokens_of("qwen3", messages)
    assert turns_of(chat) == ["well<|im_end|>", "<think>\nnew\n</think>\n\nyes<|im_end|>"]
    messages[-1] = {"role": "assistant", "reasoning_content": "new", "content": "yes"}
    assert turns_of(tokens_of("qwen3", messages)) == turns_of(chat)
    # an empty thought that the template inserts is not the assistant's
    assert turns_of(tokens_of("qwen3", chat_of("hi", "yes"))) == ["yes<|im_end|>"]


def test_calls_of_tools_are_the_assistants() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "it is 42"},
    ]
    first, second = turns_of(tokens_of("qwen3", messages))
    assert '<tool_call>\n{"name": "f"' in first
    assert first.endswith("</tool_call><|im_end|>")
    assert second == "it is 42<|im_end|>"
    with pytest.raises(ValueError, match="ignores tool_calls, but message 2 has"):
        tokens_of("chatml", messages)


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    messages = [{"role": "system", "content": "be good"}, *chat_of("a", "b")]
    with pytest.raises(ValueError, match="ignores message 1, which has the role system"):
        tokens_of("alpaca", messages)


@pytest.mark.parametrize(
    ("template", "messages", "match"),
    [
        ("gemma", chat_of("a", first="assistant"), "roles must alternate"),
        ("gemma", [*chat_of("a", "b"), *chat_of("c", first="assistant")], "roles must alternate"),
        ("mistral", [{"role": "system", "content": "s"}], "Only user and assistant"),
        ("{{ messages[0].x.y }}", chat_of("a", "b"), "no attribute 'x'"),
        ("{{ 1 + messages[0].content }}", chat_of("a", "b"), "unsupported operand"),
        ("{{ messages | length }}", chat_of("a", "b"), "ignores message 1"),
        ("{{ messages[0].content }}", chat_of("a", "b"), "message 2 cannot be found"),
        (TWICE, chat_of("a", "b"), "cannot be found"),
    ],
)  # fmt: skip
def test_unusable_messages_are_refused_in_one_line(
    template: str, messages: list[dict[str, Any]], match: str
) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        tokens_of(template, messages)
    assert str(caught.value).startswith("row 7 of x.jsonl: ")
    assert "\n" not in str(caught.value)


def test_the_end_token_of_the_template_is_seen() -> None:
    assert tokens_of("mistral", chat_of("a", "b")).is_ended
    assert not tokens_of("chatml", chat_of("a", "b")).is_ended
    assert not tokens_of("alpaca", chat_of("a", "b </s>")).is_ended


def test_a_template_is_found_or_a_missing_one_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="give a Jinja file with --chat-template"):
        load_template(tiny_tokenizer(), None)
    file = tmp_path / "t.jinja"
    with pytest.raises(ValueError, match="No such file"):
        load_template(TOKENIZER, str(file))
    for content, match in ((b" ", "empty"), (b"{% for %}", "line 1"), (b"\xff", "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            load_template(TOKENIZER, str(file))
    file.write_text(TEMPLATES["chatml"])
    assert load_template(TOKENIZER, str(file)) == TEMPLATES["chatml"]
