"""Names in the order in which people number them."""

from pathlib import PurePath

from hypothesis import given
from hypothesis import strategies as st

from mpcache.natural_sort import natural_key, natural_path_key


def test_numbers_count_by_value() -> None:
    names = ["layers.10", "layers.2", "layers.2.mlp", "embed", "norm"]
    ordered = ["embed", "layers.2", "layers.2.mlp", "layers.10", "norm"]
    assert sorted(names, key=natural_key) == ordered


def test_folders_are_compared_one_by_one() -> None:
    paths = [PurePath("a-10/1"), PurePath("a-9/2"), PurePath("a-9/01"), PurePath("a-9/1")]
    ordered = ["a-9/01", "a-9/1", "a-9/2", "a-10/1"]
    assert [path.as_posix() for path in sorted(paths, key=natural_path_key)] == ordered


@given(st.lists(st.integers(0, 10**12), min_size=2))
def test_numbered_names_have_the_order_of_their_numbers(numbers: list[int]) -> None:
    names = [f"part-{number}" for number in sorted(numbers)]
    assert sorted(names, key=natural_key) == names
