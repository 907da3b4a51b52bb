"""Documents that are run alone, in pieces. Documents without tokens are left out."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcache.config import CollectConfig, split_of
from mpcache.data.documents import Documents
from mpcache.data.packing import FIRST_PARTS, Cursor, PartTokens, iter_parts
from mpcache.store.next_token_parts import next_part
from tests.helpers.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BOS, EOS = 256, 257
CTX_LEN = 4


def make_config(**changes: object) -> CollectConfig:
    usual = {"model": "m", "dataset": "d", "hookpoints": ("layers.1",), "chunk_rows": 1}
    usual |= {"ctx_len": CTX_LEN, "part_rows": 8, "validation_every": 3}
    return CollectConfig(**(usual | {"one_document_per_sequence": True} | changes))  # type: ignore[arg-type]


def parts_of(
    texts: Sequence[str], config: CollectConfig, cursors: object = FIRST_PARTS
) -> list[PartTokens]:
    documents = Documents("digest", {}, lambda start: iter(texts[start:]))
    return list(iter_parts(documents, TOKENIZER, config, cursors))  # type: ignore[arg-type]


def pieces_of(texts: Sequence[str], split: str, config: CollectConfig) -> list[list[int]]:
    """The slow reference: each document cut into pieces."""
    pieces = []
    for i, text in enumerate(texts):
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        is_left_out = not ids and not config.keep_empty_documents
        if split_of(i, config.validation_every) != split or is_left_out:
            continue
        ids = [BOS] * (config.bos == "document") + ids + [EOS] * config.eos
        first = [BOS] * (config.bos == "sequence")
        step = CTX_LEN - len(first)
        pieces += [first + ids[at : at + step] for at in range(0, len(ids), step)]
    return pieces


def pieces_in(part: PartTokens) -> list[list[int]]:
    assert part.flags is not None
    tokens, starts = part.tokens.reshape(-1), part.flags.reshape(-1) & 1
    assert starts[0] == 1
    assert not starts[part.rows :].any()
    assert not tokens[part.rows :].any()
    cuts = np.flatnonzero(starts[: part.rows])[1:]
    return [piece.tolist() for piece in np.split(tokens[: part.rows], cuts)]


def plain(part: PartTokens) -> tuple[object, ...]:
    flags = None if part.flags is None else part.flags.tolist()
    tokens = (part.tokens.tolist(), flags, part.rows, part.empty_documents)
    return (part.part, part.split, *tokens, part.cursor, part.next_cursor, part.last)


texts_ = st.lists(st.text("abcé ", max_size=9), min_size=12, max_size=60)
changes_ = st.fixed_dictionaries(
    {
        "part_rows": st.sampled_from([4, 8, 20]),
        "validation_every": st.integers(2, 5),
        "bos": st.sampled_from(["none", "document", "sequence"]),
        "eos": st.booleans(),
        "keep_empty_documents": st.booleans(),
    }
)


@settings(deadline=None, max_examples=60)
@given(texts_, changes_)
def test_every_document_is_there_once_in_order_in_pieces(
    texts: list[str], changes: dict[str, object]
) -> None:
    config = make_config(**changes)
    wanted = {split: pieces_of(texts, split, config) for split in ("train", "validation")}
    if not all(wanted.values()):
        with pytest.raises(ValueError, match="each split must fill at least one sequence"):
            parts_of(texts, config)
        return
    parts = parts_of(texts, config)
    for split, pieces in wanted.items():
        own = [part for part in parts if part.split == split]
        assert sum((pieces_in(part) for part in own), []) == pieces  # noqa: RUF017
        assert all(len(piece) <= CTX_LEN for piece in pieces)
        assert [part.last for part in own] == [False] * (len(own) - 1) + [True]
        for part in own:
            assert part.rows <= config.part_rows
            assert part.tokens.shape == (-(-part.rows // CTX_LEN), CTX_LEN)
            assert part.last or part.rows > config.part_rows - CTX_LEN


@pytest.mark.parametrize("lone", [True, False])
@settings(deadline=None, max_examples=40)
@given(texts_, changes_, st.data())
def test_parts_are_the_same_from_any_cursor(
    lone: bool, texts: list[str], changes: dict[str, object], data: st.DataObject
) -> None:
    config = make_config(**changes, one_document_per_sequence=lone)
    try:
        parts = parts_of(texts, config)
    except ValueError:
        return
    done = data.draw(st.integers(0, len(parts)))
    cursors = dict(FIRST_PARTS)
    for part in parts[:done]:
        assert cursors.pop(part.part) == part.cursor
        cursors[next_part(part.part, config.validation_every)] = part.next_cursor
    for got, want in zip(parts_of(texts, config, cursors), parts[done:], strict=True):
        assert plain(got) == plain(want)


@pytest.mark.parametrize("lone", [True, False])
@settings(deadline=None, max_examples=40)
@given(texts_, st.integers(2, 5))
def test_documents_left_out_are_counted_once(lone: bool, texts: list[str], every: int) -> None:
    config = make_config(validation_every=every, one_document_per_sequence=lone)
    try:
        parts = parts_of(texts, config)
    except ValueError:
        return
    assert sum(part.empty_documents or 0 for part in parts) == texts.count("")
    kept = make_config(
        validation_every=every, one_document_per_sequence=lone, keep_empty_documents=True
    )
    assert all(part.empty_documents is None for part in parts_of(texts, kept))


def test_an_empty_document_moves_no_other_to_another_split() -> None:
    texts = ["abc", "def", "", "ghi", "", "jkl", "mno"]
    parts = parts_of(texts, make_config(validation_every=3, eos=False))
    tokens_by_split = {part.split: bytes(sum(pieces_in(part), [])) for part in parts}  # noqa: RUF017
    alphabet = {chr(i + 33): i for i in range(94)}
    wanted = {"train": "abcghijklmno", "validation": "def"}
    wanted = {split: [alphabet[c] for c in text] for split, text in wanted.items()}
    train = [i for part in parts if part.split == "train" for p in pieces_in(part) for i in p]
    assert train == wanted["train"]
    assert list(tokens_by_split["validation"]) == wanted["validation"]


def test_a_piece_that_begins_with_the_begin_token_gets_no_other() -> None:
    config = make_config(bos="sequence", eos=False, parse_special_tokens=True)
    texts = ["<s>abcdefgh", "<s>x"] * 3
    train, *_ = parts_of(texts, config)
    pieces = pieces_in(train)
    assert [piece[0] for piece in pieces] == [BOS] * len(pieces)
    assert [piece.count(BOS) for piece in pieces] == [1] * len(pieces)
    assert [len(piece) for piece in pieces][:2] == [4, 4]
    resumed = parts_of(texts, config, {2: train.next_cursor})
    assert resumed[0].cursor == train.next_cursor


def test_a_first_cursor_starts_at_the_first_document() -> None:
    assert {0: Cursor(0, 0), 1: Cursor(0, 0)} == FIRST_PARTS
