"""By default a text that mentions the name of a special token does not become that token."""

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mpcache.data.text_tokenizer import LiteralTextTokenizer, ParsingTextTokenizer, special_names
from tests.helpers.tokenizers_of_kinds import KINDS

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
words_ = st.sampled_from(["the", " ", "cat", "\n", "A", "<", "s>", "</", "|", "é", "[", "SEP]"])


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


@functools.cache
def plain_of(kind: str) -> LiteralTextTokenizer:
    return LiteralTextTokenizer(tokenizer_of(kind))


def names_of(kind: str) -> list[str]:
    tokenizer = tokenizer_of(kind)
    return special_names(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()))


def special_ids(kind: str) -> set[int]:
    """Ids of all special tokens but the unknown token."""
    tokenizer = tokenizer_of(kind)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    is_used = model.get("unk_token") is not None or model.get("unk_id") is not None
    unknown = {tokenizer.unk_token_id} if is_used else set()
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - unknown


@EVERY_KIND
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_special_token_comes_out_of_any_text(kind: str, data: st.DataObject) -> None:
    word = words_ | st.sampled_from(names_of(kind)) | st.text(max_size=3)
    text = "".join(data.draw(st.lists(word, max_size=9)))
    tokenizer = tokenizer_of(kind)
    (ids,) = plain_of(kind).encode([text])
    ordinary = {tokenizer.convert_tokens_to_ids("<think>")}
    assert not (special_ids(kind) - ordinary) & set(ids.tolist())


@EVERY_KIND
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_text_without_such_names_gets_the_same_tokens(kind: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(words_ | st.text(max_size=3), max_size=9)))
    names = names_of(kind)
    if any(name.lower() in text.lower() for name in names):
        return
    (plain,), (parsed,) = (
        tokenizer.encode([text])
        for tokenizer in (plain_of(kind), ParsingTextTokenizer(tokenizer_of(kind)))
    )
    assert plain.tolist() == parsed.tolist()


@EVERY_KIND
def test_a_name_is_read_as_its_letters_or_as_that_token(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    end = tokenizer.eos_token or tokenizer.sep_token
    text = f"the cat {end} sat"
    (plain,), (parsed,) = (
        policy.encode([text]) for policy in (plain_of(kind), ParsingTextTokenizer(tokenizer))
    )
    number = tokenizer.convert_tokens_to_ids(end)
    assert number in parsed
    assert number not in plain
    assert len(plain) >= len(parsed)


def test_an_added_token_that_is_not_special_stays_a_token() -> None:
    tokenizer = tokenizer_of("byte_level")
    (ids,) = plain_of("byte_level").encode(["a <think> b"])
    assert tokenizer.convert_tokens_to_ids("<think>") in ids


def test_a_lone_character_is_text_whatever_it_is_used_for() -> None:
    tokenizer = KINDS["byte_level"]()
    tokenizer.pad_token = "!"
    (ids,) = LiteralTextTokenizer(tokenizer).encode(["a!"])
    assert tokenizer.decode(ids.tolist()) == "a!"


def test_the_tokenizer_itself_stays_as_it_was() -> None:
    tokenizer = KINDS["unigram"]()
    before = tokenizer.backend_tokenizer.to_str()
    LiteralTextTokenizer(tokenizer).encode(["the </s>"])
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("policy", [ParsingTextTokenizer, LiteralTextTokenizer])
@EVERY_KIND
def test_chats_are_never_cut_or_padded(
    kind: str, policy: type[ParsingTextTokenizer] | type[LiteralTextTokenizer]
) -> None:
    """Neither `tokenizer.json` nor an earlier call of the tokenizer makes it cut or pad."""
    chats = ["the cat sat on the mat, the cat sat", "A", "the"]
    tokenizer = KINDS[kind]()
    expected = [encoding.ids for encoding in policy(tokenizer).encode_chats(chats)]
    assert max(map(len, expected)) > 4
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    text = policy(tokenizer)
    assert [encoding.ids for encoding in text.encode_chats(chats)] == expected
    text.encode(chats)
    assert [encoding.ids for encoding in text.encode_chats(chats)] == expected
    assert [encoding.ids for encoding in policy(tokenizer).encode_chats(chats)] == expected
