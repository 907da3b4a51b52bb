"""From which share of its training on a curve stays below another, on invented curves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptrain.experiments.ahead import Curve, ahead_from, describe_lead, fvu_at

FVUS = st.lists(st.floats(0.01, 1), min_size=1, max_size=8)
SECONDS = st.floats(0.1, 10)


def curve(fvus: list[float], seconds: float = 1.0) -> Curve:
    return [(n * seconds, fvu) for n, fvu in enumerate(fvus, 1)]


@pytest.mark.parametrize(
    ("fvus", "seconds", "expected"),
    [
        ([0.8, 0.6, 0.4, 0.2], 1.0, 0.0),
        ([0.95, 0.6, 0.4, 0.2], 1.0, 0.5),
        ([0.8, 0.6, 0.4, 0.35], 1.0, None),  # not in the end
        ([0.8, 0.75, 0.4, 0.2], 1.0, 0.75),  # a lead that is lost again does not count
        ([0.95, 0.6, 0.35, 0.2], 4.0, 1.0),  # of its own time; the other one ends at 4 s with .3
        ([0.95, 0.2], 0.5, 1.0),  # it is below until the other one ends
        ([0.95, 0.31], 0.5, None),  # it ends first, and the other one passes below it
    ],
)
def test_the_share_after_which_a_curve_stays_below(
    fvus: list[float], seconds: float, expected: float | None
) -> None:
    other = curve([0.9, 0.7, 0.5, 0.3])
    assert ahead_from(curve(fvus, seconds), other) == expected


@given(FVUS, FVUS, SECONDS, SECONDS)
def test_at_most_one_of_two_curves_is_ahead(
    fvus: list[float], others: list[float], seconds: float, other_seconds: float
) -> None:
    first, second = curve(fvus, seconds), curve(others, other_seconds)
    share, other_share = ahead_from(first, second), ahead_from(second, first)
    assert share is None or other_share is None
    assert ahead_from(first, first) is None
    if share is not None:
        assert 0 <= share <= 1
        assert first[-1][1] < second[-1][1]
        for x, fvu in first:
            assert x < share * first[-1][0] or fvu < fvu_at(second, x)


@given(FVUS, FVUS, st.sampled_from([0.25, 2.0, 64.0]))
def test_a_share_has_no_unit(fvus: list[float], others: list[float], unit: float) -> None:
    expected = ahead_from(curve(fvus), curve(others, 0.5))
    assert ahead_from(curve(fvus, unit), curve(others, 0.5 * unit)) == expected


def test_fvu_lies_between_validations_and_stays_after_the_last() -> None:
    points = curve([0.8, 0.4])
    assert [fvu_at(points, x) for x in (0.5, 1.0, 1.5, 2.0, 9.0)] == pytest.approx(
        [0.8, 0.8, 0.6, 0.4, 0.4]
    )


def test_the_lead_in_words() -> None:
    assert describe_lead([0.0], [None]) == (
        "MP stays below TopK: at equal rows from the start; at equal train time never"
    )
    assert describe_lead([0.0, 0.1, None], [0.25, 0.25, 0.25]) == (
        "MP stays below TopK: at equal rows from 0 to 10 % of its rows on in 2 of 3 panels; "
        "at equal train time from 25 % of its train time on in 3 of 3 panels"
    )
