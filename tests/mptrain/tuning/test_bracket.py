"""A search ends at the best value, with a worse one on either side."""

import math

from hypothesis import given
from hypothesis import strategies as st

from mptrain.tuning.bracket import (
    FARTHEST,
    best_position,
    is_at_edge,
    next_positions,
    value_at,
)


def search(fvu_at: dict[int, float], stride: int = 1) -> tuple[dict[int, float], int]:
    """What a search trains, and in how many rounds."""
    trained: dict[int, float] = {}
    rounds = 0
    while wanted := next_positions(trained, stride):
        assert not trained.keys() & set(wanted), "no value is trained twice"
        trained |= {position: fvu_at[position] for position in wanted}
        rounds += 1
    return trained, rounds


@given(
    st.integers(-FARTHEST + 1, FARTHEST - 1),
    st.lists(st.floats(0.001, 1), min_size=2 * FARTHEST + 1, max_size=2 * FARTHEST + 1),
    st.integers(0, 5),
)
def test_the_optimum_of_a_valley_is_found(optimum: int, steps: list[float], diverging: int) -> None:
    """Whatever its slopes are; the highest rates may diverge."""
    fvu = {optimum: 0.5}
    for position in range(optimum + 1, FARTHEST + 1):
        fvu[position] = fvu[position - 1] + steps[position]
    for position in range(optimum - 1, -FARTHEST - 1, -1):
        fvu[position] = fvu[position + 1] + steps[position]
    for position in range(max(optimum + 1, FARTHEST + 1 - diverging), FARTHEST + 1):
        fvu[position] = math.inf
    trained, rounds = search(fvu)
    assert best_position(trained) == optimum
    assert {optimum - 1, optimum + 1} <= trained.keys()
    assert not is_at_edge(optimum, trained)
    assert rounds <= 1 + math.ceil(abs(optimum) / 2), "two values a round"


@given(st.integers(-2 * FARTHEST + 2, 2 * FARTHEST - 2), st.floats(0.1, 10))
def test_strides_find_the_optimum_of_a_valley_too(optimum: int, slope: float) -> None:
    """Between values that are two apart, where both sides rise alike or one much faster."""
    positions = range(-2 * FARTHEST, 2 * FARTHEST + 1)
    fvu = {p: 1 + (p - optimum if p > optimum else slope * (optimum - p)) for p in positions}
    trained, rounds = search(fvu, stride=2)
    assert best_position(trained) == optimum
    assert {optimum - 1, optimum + 1} <= trained.keys()
    assert rounds <= 3 + abs(optimum) // 4, "two strides a round, and a last round between them"
    assert len(trained) <= 3 + 2 * (rounds - 1)


def test_a_setting_without_effect_ends_the_search() -> None:
    trained, rounds = search(dict.fromkeys(range(-FARTHEST, FARTHEST + 1), 0.3))
    assert (best_position(trained), rounds) == (0, 1)


def test_a_search_ends_where_values_only_get_better() -> None:
    trained, _ = search({p: 1 - p / 100 for p in range(-FARTHEST, FARTHEST + 1)})
    assert best_position(trained) == FARTHEST
    assert is_at_edge(FARTHEST, trained)


def test_lower_values_are_tried_where_all_diverge() -> None:
    fvu = {p: math.nan if p > -4 else 0.5 + abs(p + 6) for p in range(-FARTHEST, FARTHEST + 1)}
    trained, _ = search(fvu)
    assert best_position(trained) == -6
    everywhere, _ = search(dict.fromkeys(range(-FARTHEST, FARTHEST + 1), math.inf))
    assert best_position(everywhere) is None
    assert min(everywhere) == -FARTHEST


@given(st.floats(1e-6, 1e3), st.integers(-FARTHEST, FARTHEST))
def test_values_are_what_names_show(start: float, position: int) -> None:
    value = value_at(start, 2.0, position)
    assert float(f"{value:g}") == value
    assert math.isclose(value, start * 2.0**position, rel_tol=1e-5)
