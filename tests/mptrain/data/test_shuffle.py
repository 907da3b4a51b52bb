"""The reading order is a permutation, lazy and seekable, and mixes rows that are close on disk."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpcache.config import CollectConfig
from mptrain.config.coder_grid import FitConfig
from mptrain.data.shuffle import EpochOrder, Shuffle, epoch_order

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)
shapes = st.tuples(sizes, st.integers(1, 12), st.integers(1, 40))
keys = st.tuples(st.integers(0, 2**70), st.integers(0, 5))


def make(shape: tuple[list[int], int, int], key: tuple[int, int]) -> EpochOrder:
    part_sizes, chunk_rows, window = shape
    return epoch_order(part_sizes, chunk_rows, seed=key[0], epoch=key[1], window=window)


def rows_of_window(order: EpochOrder, number: int, chunk_rows: int) -> list[tuple[int, int]]:
    """(part, row in the part) in the order of reading."""
    window = order.window(number)
    laid = [(c.part, c.chunk * chunk_rows + row) for c in window.chunks for row in range(c.rows)]
    assert window.rows == len(laid)
    return [laid[i] for i in window.permutation()]


def rows_of(order: EpochOrder, chunk_rows: int) -> list[tuple[int, int]]:
    return [row for g in range(order.windows) for row in rows_of_window(order, g, chunk_rows)]


@given(shapes, keys)
def test_is_a_permutation_of_all_rows(shape, key):
    order = make(shape, key)
    rows = rows_of(order, shape[1])
    assert sorted(rows) == [(p, row) for p, size in enumerate(shape[0]) for row in range(size)]
    assert len(order) == len(rows)


@given(shapes, keys, st.data())
def test_a_seek_equals_iteration(shape, key, data):
    order = make(shape, key)
    offset = data.draw(st.integers(0, len(order) - 1))
    window, within = order.locate(offset)
    assert (
        rows_of_window(order, window, shape[1])[within:]
        == (rows_of(order, shape[1])[offset : order.start(window + 1)])
    )
    assert order.start(0) == 0
    assert order.start(order.windows) == len(order)


@given(shapes, keys)
def test_every_window_but_the_last_is_full(shape, key):
    order = make(shape, key)
    counts = [len(order.window(g).chunks) for g in range(order.windows)]
    assert set(counts[:-1]) <= {shape[2]}
    assert 1 <= counts[-1] <= shape[2]


@given(shapes, keys)
def test_the_order_of_chunks_does_not_depend_on_the_window(shape, key):
    one_window, order = make((shape[0], shape[1], 1000), key), make(shape, key)
    chunks = [c for g in range(order.windows) for c in order.window(g).chunks]
    assert tuple(chunks) == one_window.window(0).chunks


@pytest.mark.parametrize(("window", "chunk_rows"), [(1, 3), (4, 5), (1000, 1)])
def test_seed_and_epoch_decide(window, chunk_rows):
    def draw(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = epoch_order([23, 1, 40], chunk_rows, seed=seed, epoch=epoch, window=window)
        return rows_of(order, chunk_rows)

    assert draw(3, 0) == draw(3, 0)
    different = [draw(seed, epoch) for seed in (0, 1, 2**32) for epoch in (0, 1)]
    assert len({tuple(rows) for rows in different}) == len(different)


def test_seed_and_epoch_decide_the_order_of_chunks():
    """Not only the order of rows within windows."""
    orders = [
        epoch_order([20, 20], 2, seed=seed, epoch=epoch, window=20).window(0).chunks
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == len(orders)
    assert len({frozenset(chunks) for chunks in orders}) == 1


FROZEN = [(1, 1), (1, 0), (1, 2), (0, 2), (0, 1), (0, 0), (0, 3), (0, 4)]


def test_the_order_is_frozen():
    """A changed order would silently break runs that are continued with a newer version."""
    order = epoch_order([5, 3], 2, seed=0, epoch=0, window=2)
    assert rows_of(order, 2) == FROZEN


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_positions_are_uniform_over_seeds(n):
    seeds = 600
    tally = np.zeros((n, n))
    for seed in range(seeds):
        tally[np.arange(n), Shuffle(n, (seed, 0))(np.arange(n))] += 1
    # 5 standard deviations of a binomial count
    expected, spread = seeds / n, np.sqrt(seeds / n * (1 - 1 / n))
    assert np.abs(tally - expected).max() <= 5 * spread


def test_all_orders_of_four_are_as_frequent():
    seeds = 1200
    drawn = [tuple(Shuffle(4, (seed, 1))(np.arange(4)).tolist()) for seed in range(seeds)]
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 50) ** 2 / 50).sum() < 50  # chi square, 23 degrees of freedom: p = 1e-3


@given(st.integers(1, 10**15), keys, st.data())
def test_inverse_undoes_the_shuffle(n, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=5)), dtype=np.int64)
    shuffle = Shuffle(n, key)
    image = shuffle(index)
    assert ((image >= 0) & (image < n)).all()
    np.testing.assert_array_equal(shuffle.inverse(image), index)


@pytest.mark.parametrize("batch_rows", [4096, FitConfig.batch_rows])
def test_a_batch_of_default_sizes_mixes_sequences(batch_rows):
    """153 parts are 10 M rows."""
    parts, part_rows, chunk_rows = 153, CollectConfig.part_rows, CollectConfig.chunk_rows
    ctx_len, window_rows = CollectConfig.ctx_len, FitConfig.window_rows
    window = window_rows // chunk_rows
    order = epoch_order([part_rows] * parts, chunk_rows, seed=0, epoch=0, window=window)
    noise = np.random.default_rng(0)
    per_part = part_rows // ctx_len
    sequence = np.stack(
        [part * per_part + noise.permutation(part_rows) // ctx_len for part in range(parts)]
    )

    def distinct(number: int) -> float:
        window = order.window(number)
        laid = [sequence[c.part, c.chunk * chunk_rows :][: c.rows] for c in window.chunks]
        mixed = np.concatenate(laid)[window.permutation()]
        batches = mixed[: len(mixed) // batch_rows * batch_rows].reshape(-1, batch_rows)
        return float(np.mean([len(np.unique(batch)) for batch in batches]))

    n = parts * per_part
    ideal = n * (1 - (1 - 1 / n) ** batch_rows)
    assert np.mean([distinct(g) for g in range(3)]) >= ideal / 2


@pytest.mark.parametrize("change", [{"chunk_rows": 0}, {"window": 0}, {"seed": -1}, {"epoch": -1}])
def test_a_bad_value_is_named(change):
    good = {"chunk_rows": 1, "window": 1, "seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match=next(iter(change)) + " must be at least"):
        epoch_order([1], **(good | change))


def test_no_rows_and_no_such_offset():
    with pytest.raises(ValueError, match="no rows"):
        epoch_order([0], 1, seed=0, epoch=0, window=1)
    order = epoch_order([2], 1, seed=0, epoch=0, window=1)
    with pytest.raises(ValueError, match=r"\[0, 2\), got 2"):
        order.locate(2)
    with pytest.raises(IndexError):
        order.window(2)
