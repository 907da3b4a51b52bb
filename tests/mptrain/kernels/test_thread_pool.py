"""Threads work on each row once, and no failure is lost."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptrain.kernels.thread_pool import in_pieces


@pytest.fixture(params=[1, 2, 3], autouse=True, scope="module")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@given(st.integers(0, 50), st.integers(1, 60))
def test_every_row_is_worked_on_once(rows: int, most: int):
    seen = [0] * rows

    def work(first: int, end: int) -> None:
        assert 0 < end - first <= most
        for row in range(first, end):
            seen[row] += 1

    in_pieces(work, rows, most)
    assert seen == [1] * rows


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_raises_what_a_piece_raises(bad: int):
    def work(first: int, end: int) -> None:
        if first <= bad < end:
            raise KeyError(bad)

    with pytest.raises(KeyError, match=str(bad)):
        in_pieces(work, 10, 2)
    in_pieces(lambda first, end: None, 10, 2)  # and the next call works


def test_nothing_is_at_work_once_it_has_failed(threads: int):
    started, done = threading.Event(), []

    def work(first: int, end: int) -> None:
        if first == 0:
            if threads > 1:
                started.wait(10)
            raise ValueError("the first")
        started.set()
        time.sleep(0.02)
        done.append(first)

    with pytest.raises(ValueError, match="the first"):
        in_pieces(work, 4, 1)
    assert sorted(done) == ([] if threads == 1 else [1, 2, 3])
