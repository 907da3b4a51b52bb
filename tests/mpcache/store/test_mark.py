"""Every field of a mark is parsed, and written back byte for byte."""

import itertools
import json
from pathlib import Path, PurePosixPath

import hypothesis
import pytest
from hypothesis import strategies as st

from mpcache.errors import DamagedStoreError
from mpcache.store.mark import Mark, ObjectRecord, RowStatistics, TokenProgress, parse_mark
from mpcache.store.object_paths import TOKENS, parse_mark_path
from mpcache.store.reader import open_store
from mpcache.store.sealed_json import digest, seal, unseal
from mpcache.store.units_of_part import join_progress, split_progress
from tests.helpers.paths import GOLDEN

COUNTS = st.integers(0, 1 << 40)
CURSORS = st.tuples(COUNTS, COUNTS)


@pytest.mark.parametrize("version", ["store-v1", "store-v2"])
def test_marks_of_golden_stores_are_written_back_as_they_were(version: str) -> None:
    store = open_store(GOLDEN / version)
    files = sorted((GOLDEN / version / "marks").rglob("*.json"))
    assert files
    for file in files:
        known = parse_mark_path(PurePosixPath(file.relative_to(GOLDEN / version)))
        assert known is not None
        mark = store.mark(*known)
        assert mark.sealed() == file.read_bytes()
        assert digest(mark.as_json()) == json.loads(file.read_bytes())["digest"]
        assert not mark.other
        assert (mark.progress is not None) == (mark.array == TOKENS)
        assert (mark.statistics is not None) == mark.array.startswith("acts/")


def test_a_field_of_a_later_version_is_kept() -> None:
    store = open_store(GOLDEN / "store-v1")
    array = "acts/layers.0/output"
    data = store.storage.read(f"marks/0/{array.removeprefix('acts/')}.json")
    later = seal({**unseal(data, "mark"), "kurtosis": 3.0})
    mark = parse_mark(later, 0, array, store.layout, store.fingerprint, "mark")
    assert mark.other == {"kurtosis": 3.0}
    assert mark.sealed() == later


@pytest.mark.parametrize("name", ["cursor", "next_cursor", "last", "rows", "objects"])
def test_a_mark_of_tokens_without_a_field_is_refused(name: str, tmp_path: Path) -> None:
    store = open_store(GOLDEN / "store-v1")
    content = unseal(store.storage.read("marks/0/tokens.json"), "mark")
    del content[name]
    with pytest.raises(DamagedStoreError, match="fields contradict each other"):
        parse_mark(seal(content), 0, TOKENS, store.layout, store.fingerprint, "mark")


@pytest.mark.parametrize(
    ("name", "value"), [("part", 1), ("array", "rows/position"), ("split", "validation")]
)
def test_a_mark_that_names_another_part_is_refused(name: str, value: object) -> None:
    """Even where its objects are those of the part: a split decides which rows train."""
    store = open_store(GOLDEN / "store-v1")
    content = unseal(store.storage.read("marks/0/tokens.json"), "mark")
    assert content[name] != value
    with pytest.raises(
        DamagedStoreError,
        match="mark is damaged: it must describe part 0 of tokens, but describes another",
    ):
        parse_mark(
            seal({**content, name: value}), 0, TOKENS, store.layout, store.fingerprint, "mark"
        )


def test_fields_that_are_none_are_not_written() -> None:
    record = ObjectRecord(bytes=1, xxh3_128="0" * 32, values_xxh3_128="1" * 32)
    mark = Mark(
        array="acts/a/output", part=0, rows=3, split="train", objects={"x": record},
        statistics=RowStatistics(width=2, finite_rows=3, largest=1.5, nonfinite=0),
    )  # fmt: skip
    assert mark.as_json() == {
        "array": "acts/a/output", "part": 0, "rows": 3, "split": "train",
        "objects": {"x": {"bytes": 1, "xxh3_128": "0" * 32, "values_xxh3_128": "1" * 32}},
        "width": 2, "finite_rows": 3, "largest": 1.5, "nonfinite": 0,
    }  # fmt: skip


@st.composite
def progress_of_units(draw: st.DrawFn) -> list[TokenProgress]:
    """Units that follow each other; all count empty documents, or none does."""
    cursors = draw(st.lists(CURSORS, min_size=2, max_size=6))
    counts = draw(st.booleans())
    is_last = draw(st.booleans())
    return [
        TokenProgress(
            cursor=start,
            next_cursor=end,
            last=is_last and index == len(cursors) - 2,
            empty_documents=draw(st.integers(0, 9)) if counts else None,
        )
        for index, (start, end) in enumerate(itertools.pairwise(cursors))
    ]


@hypothesis.given(progress_of_units())
def test_units_are_split_as_they_were_joined(units: list[TokenProgress]) -> None:
    part = join_progress(units)
    assert split_progress(part) == units
    assert (part.cursor, part.next_cursor) == (units[0].cursor, units[-1].next_cursor)
