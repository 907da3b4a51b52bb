"""Which parts still lack tokens: the plan against a walk over all parts."""

from hypothesis import given
from hypothesis import strategies as st

from mpcache.config import split_of
from mpcache.store.next_token_parts import first_missing_parts, next_part


@given(part=st.integers(0, 500), every=st.integers(2, 9))
def test_the_next_part_is_the_next_of_the_same_split(part: int, every: int) -> None:
    split = split_of(part, every)
    later = range(part + 1, part + 2 * every + 2)
    assert next_part(part, every) == next(p for p in later if split_of(p, every) == split)


@given(
    lengths=st.tuples(st.integers(0, 12), st.integers(0, 5)),
    ended=st.tuples(st.booleans(), st.booleans()),
    wanted=st.integers(2, 40),
    every=st.integers(2, 7),
)
def test_a_split_misses_its_first_uncommitted_part_unless_it_has_ended(
    lengths: tuple[int, int], ended: tuple[bool, bool], wanted: int, every: int
) -> None:
    committed, last, expected = set[int](), set[int](), dict[int, int | None]()
    for split, length, has_ended in zip(("train", "validation"), lengths, ended, strict=True):
        numbers = [p for p in range(200) if split_of(p, every) == split]
        committed |= set(numbers[:length])
        if has_ended and length:
            last.add(numbers[length - 1])
        elif numbers[length] < wanted:
            expected[numbers[length]] = numbers[length - 1] if length else None
    asked: list[int] = []

    def ends_split(part: int) -> bool:
        asked.append(part)
        return part in last

    assert first_missing_parts(committed, wanted, every, ends_split) == expected
    assert len(asked) <= 2, "an answer takes a read, so each split is asked once"


def test_what_follows_a_gap_does_not_count() -> None:
    """A mark that was deleted: its part is missing, though later parts are committed."""
    missing = first_missing_parts({0, 1, 3, 4}, 6, 4, lambda part: part == 4)
    assert missing == {2: 0, 5: 1}
