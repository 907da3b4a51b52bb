"""Packing loses no token, repeats none, and does not depend on its starting point."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcache.config import CollectConfig
from mpcache.data.document_boundaries import document_starts, position_ids
from mpcache.data.documents import Documents
from mpcache.data.packing import (
    Cursor,
    PartTokens,
    SpecialTokens,
    iter_parts,
    split_of,
)
from mpcache.data.permutation import row_permutation, seeded_permutation
from mpcache.data.special_tokens import special_tokens_of
from mpcache.store.next_token_parts import next_part
from tests.helpers.models import tiny_tokenizer, transformers_log

TOKENIZER = tiny_tokenizer()
BOS, EOS = 256, 257


def make_config(**changes) -> CollectConfig:
    usual = {"model": "m", "dataset": "d", "hookpoints": ("layers.1",), "chunk_rows": 1}
    usual |= {"ctx_len": 4, "part_rows": 8, "validation_every": 3}
    return CollectConfig(**(usual | changes))


def make_documents(texts) -> Documents:
    return Documents("digest", {}, lambda start: iter(texts[start:]))


def parts_of(texts, config, **cursors) -> list[PartTokens]:
    return list(iter_parts(make_documents(texts), TOKENIZER, config, **cursors))


def token_stream(texts, split, config) -> list[int]:
    """The slow reference: each document tokenised alone."""
    stream = []
    for i, text in enumerate(texts):
        is_left_out = not text and not config.keep_empty_documents
        if split_of(i, config.validation_every) == split and not is_left_out:
            stream += [BOS] * (config.bos == "document")
            stream += TOKENIZER(text, add_special_tokens=False)["input_ids"]
            stream += [EOS] * config.eos
    return stream


texts_ = st.lists(st.text("abcé ", max_size=9), min_size=12, max_size=90)
# plain values: beartype checks configs with random numbers, which a strategy may not draw
changes_ = st.fixed_dictionaries(
    {
        "part_rows": st.sampled_from([4, 8, 20]),
        "validation_every": st.integers(2, 5),
        "bos": st.sampled_from(["none", "document", "sequence"]),
        "eos": st.booleans(),
        "keep_empty_documents": st.booleans(),
    }
)


def packs(texts, config) -> bool:
    body = 4 - (config.bos == "sequence")
    return all(len(token_stream(texts, s, config)) >= body for s in ("train", "validation"))


@settings(deadline=None)
@given(texts_, changes_)
def test_sequences_are_the_documents_of_their_split_in_order(texts, changes):
    config = make_config(**changes)
    if not packs(texts, config):
        with pytest.raises(ValueError, match="each split must fill at least one sequence"):
            parts_of(texts, config)
        return
    parts = parts_of(texts, config)
    for split in ("train", "validation"):
        own = [part for part in parts if part.split == split]
        tokens = np.concatenate([part.tokens for part in own])
        if config.bos == "sequence":
            assert (tokens[:, 0] == BOS).all()
            tokens = tokens[:, 1:]
        stream = token_stream(texts, split, config)
        assert tokens.ravel().tolist() == stream[: tokens.size]
        assert len(stream) - tokens.size < tokens.shape[1]
        assert [part.last for part in own] == [False] * (len(own) - 1) + [True]
        assert all(len(part.tokens) * 4 == config.part_rows for part in own[:-1])
        numbers = [n for n in range(999) if split_of(n, config.validation_every) == split]
        assert [part.part for part in own] == numbers[: len(own)]


@settings(deadline=None)
@given(texts_, st.data())
def test_parts_are_the_same_from_any_cursor(texts, data):
    bos = data.draw(st.sampled_from(["none", "document", "sequence"]))
    config = make_config(bos=bos, keep_empty_documents=True)
    parts = parts_of(texts, config)
    done = data.draw(st.integers(2, len(parts)))
    cursors = {0: Cursor(0, 0), 1: Cursor(0, 0)}
    for part in parts[:done]:
        assert cursors.pop(part.part) == part.cursor
        cursors[next_part(part.part, config.validation_every)] = part.next_cursor
    for actual, expected in zip(
        parts_of(texts, config, cursors=cursors), parts[done:], strict=True
    ):
        assert same(actual, expected)


def same(first: PartTokens, second: PartTokens) -> bool:
    plain = [
        (p.part, p.split, p.tokens.tolist(), p.cursor, p.next_cursor, p.last)
        for p in (first, second)
    ]
    return plain[0] == plain[1]


def test_one_part_reads_only_the_documents_it_needs():
    texts, read = ["abcdefghijk"] * 600, []

    def order(start):
        for i in range(start, len(texts)):
            read.append(i)
            yield texts[i]

    config = make_config()
    expected = parts_of(texts, config)[9]
    documents = Documents("digest", {}, order)
    actual = next(iter_parts(documents, TOKENIZER, config, {expected.part: expected.cursor}))
    assert same(actual, expected)
    assert read[0] == expected.cursor.document
    assert len(read) <= 64


def test_a_part_comes_before_the_documents_end():
    endless = Documents("digest", {}, lambda start: iter(lambda: "abcdef", None))
    parts = list(islice(iter_parts(endless, TOKENIZER, make_config()), 5))
    assert [part.part for part in parts] == [0, 1, 2, 3, 4]
    assert not any(part.last for part in parts)


def test_documents_may_come_as_tokens():
    texts = ["abc", "de", "fghi", "", "jklm", "nop", "qr"] * 5
    tokens = [np.array(TOKENIZER(t)["input_ids"], np.uint16) for t in texts]
    config = make_config(bos="document")
    for of_texts, of_tokens in zip(parts_of(texts, config), parts_of(tokens, config), strict=True):
        assert same(of_texts, of_tokens)


def test_tokens_have_the_smallest_dtype():
    assert parts_of(["abcdef"] * 9, make_config())[0].tokens.dtype == np.uint16


def test_long_documents_raise_no_warning():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    with transformers_log() as records:
        list(iter_parts(make_documents(["abcdef" * 9] * 9), tokenizer, make_config()))
        assert not records
        tokenizer("abcdef" * 9)
        assert len(records) == 1


def test_too_few_documents_are_counted():
    with pytest.raises(ValueError, match="got no validation sequence from 1 documents; use more"):
        parts_of(["abcdefgh"], make_config())


@pytest.mark.parametrize(
    ("tokenizer", "changes", "message"),
    [
        (
            {"bos": None},
            {"bos": "document"},
            "needs a tokenizer with a BOS or CLS token, got none; use",
        ),
        ({"eos": None}, {}, "needs a tokenizer with an EOS or SEP token, got none; use --no-eos"),
        ({}, {"bos": "sequence", "ctx_len": 1}, "needs ctx_len of at least 2"),
        (
            {},
            {"eos": False, "cross_document_attention": False},
            "a token must mark the start or end",
        ),
    ],
)
def test_refuses(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        special_tokens_of(tiny_tokenizer(**tokenizer), make_config(**changes))


def test_cls_and_sep_stand_in_for_missing_bos_and_eos():
    tokenizer = tiny_tokenizer(bos=None, eos=None)
    tokenizer.cls_token, tokenizer.sep_token = "<s>", "</s>"
    specials = special_tokens_of(tokenizer, make_config(bos="document"))
    assert (specials.begin, specials.end) == (BOS, EOS)


# --- documents of a sequence ---


@pytest.mark.parametrize(
    ("specials", "tokens", "positions"),
    [
        (SpecialTokens(None, "document", 9), [1, 2, 9, 3, 9, 9, 4], [0, 1, 2, 0, 1, 0, 0]),
        (SpecialTokens(8, "document", 9), [2, 9, 8, 3, 9, 8, 4], [0, 1, 0, 1, 2, 0, 1]),
        (SpecialTokens(8, "document", None), [2, 2, 8, 3, 8, 4, 4], [0, 1, 0, 1, 0, 1, 2]),
        (SpecialTokens(8, "sequence", 9), [8, 1, 9, 3, 9, 4, 4], [0, 1, 2, 0, 1, 0, 1]),
        # begin and end are one token: the second of a pair begins, and the first of a sequence
        (SpecialTokens(9, "document", 9), [9, 1, 9, 9, 2, 9, 9], [0, 1, 2, 0, 1, 2, 0]),
        (SpecialTokens(9, "document", 9), [9, 9, 1, 1, 9, 9, 2], [0, 0, 1, 2, 3, 0, 1]),
        (SpecialTokens(9, "sequence", 9), [9, 1, 9, 2, 2, 9, 3], [0, 1, 2, 0, 1, 2, 0]),
    ],
)
def test_positions_restart_at_documents(specials, tokens, positions):
    assert position_ids(np.array([tokens], np.uint8), specials).tolist() == [positions]


@given(texts_, st.booleans())
@settings(deadline=None)
def test_document_starts_are_where_documents_start(texts, begins):
    bos = "document" if begins else "none"
    config = make_config(bos=bos, cross_document_attention=False, keep_empty_documents=True)
    specials = special_tokens_of(TOKENIZER, config)
    parts = [part for part in parts_of(texts, config) if part.split == "train"]
    lengths = [
        len(TOKENIZER(text)["input_ids"]) + 1 + begins
        for i, text in enumerate(texts)
        if split_of(i, config.validation_every) == "train"
    ]
    flags = np.concatenate([document_starts(part.tokens, specials) for part in parts]).ravel()
    expected = np.zeros_like(flags)
    starts = np.cumsum([0, *lengths])
    expected[starts[starts < expected.size]] = True
    expected[::4] = True  # each sequence
    assert flags.tolist() == expected.tolist()


# --- rows ---


@given(st.integers(0, 2**40), st.integers(0, 999), st.integers(0, 300))
def test_rows_are_permuted(seed, part, rows):
    order = row_permutation(seed, part, rows)
    assert sorted(order) == list(range(rows))
    assert order.dtype == np.int64


def test_seed_and_part_change_the_rows():
    orders = {tuple(row_permutation(seed, part, 64)) for seed in range(5) for part in range(5)}
    assert len(orders) == 25


def test_the_permutation_never_changes():
    """Existing stores are extended with this permutation."""
    assert seeded_permutation(8, "key").tolist() == [6, 0, 7, 5, 3, 2, 1, 4]
