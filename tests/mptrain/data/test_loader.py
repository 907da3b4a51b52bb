"""The loader hands over every row once an epoch, restarts bit for bit, and cleans up."""

import gc
import threading
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcache.errors import DamagedStoreError
from mpcache.storage.local import LocalStorage
from mpcache.store.reader import Part, Store
from mptrain.data import windows
from mptrain.data.batches import release_after_use
from mptrain.data.buffers import BufferPool
from mptrain.data.columns import POSITION, Column
from mptrain.data.loader import Batch, Loader
from mptrain.data.shuffle import epoch_order
from mptrain.data.window_plans import WHOLE_STREAM, StreamShare, endless_plans

IN, OUT = ("layers.0", "input"), ("layers.0", "output")
WIDE = ("layers.1", "output")
WIDTHS = {IN: 3, OUT: 5, WIDE: 40}
CPU = torch.device("cpu")


@dataclass(eq=False)
class FakeStore(Store):
    """Rows that encode their number, on two sides; `before_read` may fail or wait."""

    sizes: tuple[int, ...]
    chunk: int = 4
    dtype: str = "float32"
    before_read: object = staticmethod(lambda part, chunk: None)
    reads: list[tuple[int, int]] = field(default_factory=list)
    storage: LocalStorage = field(default_factory=lambda: LocalStorage(Path("fake")))
    read_sequences = read_token_ids = read_norms = None

    def __post_init__(self):
        self.layout = SimpleNamespace(dtype=self.dtype)
        self.acts = self.tokens = self

    @property
    def chunk_rows(self):
        return self.chunk

    def width(self, hookpoint, side):
        return WIDTHS[hookpoint, side]

    def parts(self, sides, split):
        # every other number, as validation parts lie in between
        return tuple(Part(2 * i, rows, split) for i, rows in enumerate(self.sizes))

    def _numbers(self, part, chunk):
        rows = range(self.sizes[part // 2])[chunk * self.chunk :][: self.chunk]
        return torch.tensor([sum(self.sizes[: part // 2]) + row for row in rows])

    def read_chunk(self, hookpoint, side, part, chunk, out):
        self.before_read(part, chunk)
        self.reads.append((part, chunk))
        width = WIDTHS[hookpoint, side]
        rows = self._numbers(part, chunk)[:, None] * 10 + torch.arange(width)
        return out.copy_(rows)

    def read_positions(self, part):
        return torch.cat([self._numbers(part, chunk) % 7 for chunk in range(self._chunks(part))])

    def _chunks(self, part):
        return -(-self.sizes[part // 2] // self.chunk)


def make(
    store,
    *,
    sides=(IN, OUT),
    batch_rows=5,
    seed=0,
    window=2,
    device=CPU,
    threads=3,
    share=WHOLE_STREAM,
):
    return Loader(
        store, sides, "train", batch_rows=batch_rows, seed=seed, share=share,
        window_rows=window * store.chunk_rows, device=device, threads=threads,
    )  # fmt: skip


def numbers(batch: Batch) -> list[int]:
    """The rows of a batch, after a check that all sides hold the same rows."""
    numbers_B = batch.values[OUT][:, 0] / 10
    for side, values in batch.values.items():
        expected = numbers_B[:, None] * 10 + torch.arange(WIDTHS[side])
        torch.testing.assert_close(values, expected, rtol=0, atol=0)
    torch.testing.assert_close(batch.positions_B, numbers_B.long() % 7)
    return [int(number) for number in numbers_B]


def first_numbers(loader, rows, offset=0):
    batches = islice(loader.batches(offset), -(-rows // loader.batch_rows))
    return [number for batch in batches for number in numbers(batch)][:rows]


stores = st.builds(
    FakeStore,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple),
    chunk=st.integers(1, 10),
)


@settings(deadline=None, max_examples=40)
@given(stores, st.integers(1, 50), st.integers(1, 6))
def test_every_epoch_holds_every_row_once(store, batch_rows, window):
    with make(store, batch_rows=batch_rows, window=window) as loader:
        seen = first_numbers(loader, 2 * loader.rows)
    assert sorted(seen[: loader.rows]) == list(range(sum(store.sizes)))
    assert sorted(seen[loader.rows :]) == list(range(sum(store.sizes)))


@settings(deadline=None, max_examples=40)
@given(stores, st.integers(1, 9), st.integers(0, 60))
def test_a_restart_gives_the_next_batch(store, batch_rows, offset):
    with make(store, batch_rows=batch_rows) as loader:
        uninterrupted = first_numbers(loader, offset + 3 * batch_rows)
    with make(store, batch_rows=batch_rows) as loader:
        again = list(islice(loader.batches(offset), 3))
    assert [number for batch in again for number in numbers(batch)] == uninterrupted[offset:]
    assert [batch.offset for batch in again] == [offset + i * batch_rows for i in range(3)]
    assert [batch.rows for batch in again] == [batch_rows] * 3


@settings(deadline=None, max_examples=20)
@given(stores, st.integers(1, 9), st.integers(1, 9))
def test_the_order_of_rows_does_not_depend_on_the_batch_size(store, some, others):
    with make(store, batch_rows=some) as a, make(store, batch_rows=others) as b:
        assert first_numbers(a, 40) == first_numbers(b, 40)


@settings(deadline=None, max_examples=40)
@given(stores, st.integers(1, 9), st.integers(1, 6), st.integers(1, 4), st.integers(0, 40))
def test_shares_of_a_stream_make_up_the_stream(store, batch_rows, window, size, offset):
    sizes = {"batch_rows": batch_rows, "window": max(window, size)}
    with make(store, **sizes) as loader:
        undivided = [numbers(batch) for batch in islice(loader.batches(offset), 9)]
    shares = []
    for rank in range(size):
        with make(store, **sizes, share=StreamShare(rank, size)) as loader:
            batches = list(islice(loader.batches(offset), 9))
        assert [batch.offset for batch in batches] == [offset + i * batch_rows for i in range(9)]
        shares.append([numbers(batch) for batch in batches])
    for together, *apart in zip(undivided, *shares, strict=True):
        assert sorted(number for share_numbers in apart for number in share_numbers) == sorted(
            together
        )
        for share_numbers in apart:
            rest = iter(together)
            assert all(
                number in rest for number in share_numbers
            )  # in the order of the undivided stream


@given(stores, st.integers(1, 6), st.integers(1, 4))
def test_shares_of_a_stream_are_of_other_chunks(store, window, size):
    def plans(share):
        parts = store.sizes, store.chunk_rows
        return islice(endless_plans(*parts, seed=0, window=window, offset=0, share=share), 5)

    shares = zip(*(plans(StreamShare(rank, size)) for rank in range(size)), strict=True)
    for alone, apart in zip(plans(WHOLE_STREAM), shares, strict=True):
        read = [chunk for plan in apart for chunk in plan.chunks]
        assert len(read) == len(alone.chunks)
        assert set(read) == set(alone.chunks)
        assert max(len(p.chunks) for p in apart) - min(len(p.chunks) for p in apart) <= 1


@settings(deadline=None, max_examples=20)
@given(stores, st.permutations([IN, OUT, WIDE]), st.integers(1, 3), st.integers(0, 40))
def test_rows_of_a_side_do_not_depend_on_other_sides(store, sides, others, offset):
    with make(store, sides=sides[:1]) as alone, make(store, sides=sides[: 1 + others]) as beside:
        assert alone.order_digest == beside.order_digest
        streams = alone.batches(offset), beside.batches(offset)
        passes = alone.one_pass(), beside.one_pass()
        pairs = [*islice(zip(*streams, strict=True), 9), *zip(*passes, strict=True)]
    for a, b in pairs:
        assert torch.equal(a.positions_B, b.positions_B)
        assert torch.equal(a.values[sides[0]], b.values[sides[0]])


def test_epochs_and_seeds_differ():
    store = FakeStore((20, 20))
    with make(store, seed=0) as a, make(store, seed=1) as b:
        seed_0, seed_1 = first_numbers(a, 80), first_numbers(b, 80)
    assert len({tuple(rows) for rows in (seed_0[:40], seed_0[40:], seed_1[:40], seed_1[40:])}) == 4


@settings(deadline=None, max_examples=40)
@given(stores, st.integers(1, 20), st.integers(1, 50))
def test_one_pass_is_a_prefix_of_one_order(store, batch_rows, max_rows):
    def rows(batch_rows, max_rows, **options):
        with make(store, batch_rows=batch_rows, **options) as loader:
            batches = list(loader.one_pass(max_rows))
        assert all(batch.rows == batch_rows for batch in batches[:-1])
        return [number for batch in batches for number in numbers(batch)]

    full_pass = rows(3, None)
    assert sorted(full_pass) == list(range(sum(store.sizes)))
    assert rows(batch_rows, max_rows, seed=5, window=3) == full_pass[:max_rows]


def test_one_pass_reads_little_more_than_it_needs():
    store = FakeStore((100, 100))
    with make(store, batch_rows=8, window=20) as loader:
        assert sum(batch.rows for batch in loader.one_pass(16)) == 16
    assert len(set(store.reads)) == 4


def test_one_pass_takes_rows_from_many_parts():
    store = FakeStore((40,) * 10)
    with make(store, batch_rows=8) as loader:
        seen = [n for batch in loader.one_pass(80) for n in numbers(batch)]
    assert len({n // 40 for n in seen}) >= 6


def test_rows_arrive_as_they_are_stored():
    with make(FakeStore((8,), dtype="bfloat16")) as loader:
        batch = next(loader.batches())
    assert {values.dtype for values in batch.values.values()} == {torch.bfloat16}


@settings(deadline=None, max_examples=8)
@given(stores, st.integers(1, 9), st.integers(1, 6))
def test_batches_that_are_kept_are_not_overwritten(store, batch_rows, window):
    """A batch that is not released keeps its memory, also while windows use theirs again."""
    with make(store, batch_rows=batch_rows, window=window) as loader:
        kept = [batch for batch, _ in zip(loader.batches(), range(25), strict=False)]
        columns = [batch.values[OUT][:, 1:] for batch in loader.one_pass()]
        again = [numbers(batch) for batch in islice(loader.batches(), 25)]
    assert [numbers(batch) for batch in kept] == again
    assert all(torch.equal(columns_BD[:, 0], columns_BD[:, 1] - 1) for columns_BD in columns)


def test_a_damaged_chunk_is_reported_as_itself_once_it_is_needed():
    def fail(part, chunk):
        if (part, chunk) == bad:
            raise DamagedStoreError("part 0 chunk 1 is damaged")

    order = epoch_order([40], 4, seed=0, epoch=0, window=2)
    bad = (0, order.window(3).chunks[0].chunk)
    began = time.perf_counter()
    with make(FakeStore((40,), before_read=fail), batch_rows=8) as loader:
        batches = loader.batches()
        assert sum(next(batches).rows for _ in range(3)) == order.start(3)
        with pytest.raises(DamagedStoreError, match="part 0 chunk 1"):
            next(batches)
    assert time.perf_counter() - began < 5


def test_tasks_of_several_chunks_read_the_same(monkeypatch):
    read = []
    for chunks in (1, 8):
        monkeypatch.setattr(windows, "_MAX_CHUNKS_PER_TASK", chunks)
        monkeypatch.setattr(windows, "_MIN_TASKS_PER_WINDOW", 1)
        with make(FakeStore((40, 7, 33), chunk=2), window=20) as loader:
            read.append(first_numbers(loader, 200))
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("computing", "concurrency", "threads"), [(1, 1, 2), (3, 1, 3), (64, 1, 4), (64, 8, 8)]
)
def test_threads_by_default(monkeypatch, computing, concurrency, threads):
    store = FakeStore((8,))
    monkeypatch.setattr(store.storage, "concurrency", concurrency, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: computing)
    with make(store, threads=None) as loader:
        assert loader.threads == threads


def test_a_window_has_a_chunk_for_each_share():
    with pytest.raises(
        ValueError, match=r"each of 3 processes, got 2 chunks of 4 rows; use --window-rows 12 or"
    ):
        make(FakeStore((8,)), window=2, share=StreamShare(0, 3))


def test_the_next_window_is_read_while_one_is_consumed():
    store = FakeStore((40,))
    with make(store, batch_rows=8) as loader:
        next(loader.batches())
        deadline = time.perf_counter() + 5
        while len(set(store.reads)) < 4 and time.perf_counter() < deadline:
            time.sleep(0.01)
    assert len(set(store.reads)) >= 4


def test_chunks_are_read_concurrently():
    barrier = threading.Barrier(3, timeout=5)  # the barrier breaks unless three reads run at once
    store = FakeStore((24,), before_read=lambda part, chunk: barrier.wait())
    with make(store, batch_rows=12, window=3, threads=3) as loader:
        assert next(loader.batches()).rows == 12
        barrier.abort()  # otherwise a read ahead would wait for two more reads that never come


def test_waiting_is_measured():
    store = FakeStore((4,), before_read=lambda part, chunk: time.sleep(0.05))
    with make(store, batch_rows=4, window=1) as loader:
        next(loader.batches())
        assert 0.05 <= loader.wait_seconds < 5


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_threads_end_whatever_ends_the_loop(error):
    before = threading.active_count()
    store = FakeStore((400,), before_read=lambda part, chunk: time.sleep(0.01))

    def consume():
        with make(store, batch_rows=8, window=20) as loader:
            for _ in loader.batches():
                if error:
                    raise error
                break

    if error:
        with pytest.raises(error):
            consume()
    else:
        consume()
    assert threading.active_count() == before
    assert len(store.reads) < 150  # queued reads were dropped


def test_an_abandoned_stream_stops_reading():
    store = FakeStore((4000,), before_read=lambda part, chunk: time.sleep(0.002))
    with make(store, batch_rows=8, window=300) as loader:
        next(loader.batches())
        assert next(loader.one_pass(8)).rows == 8
        time.sleep(0.05)
        stopped = len(store.reads)
        time.sleep(0.05)
        assert len(store.reads) - stopped <= 3


@pytest.mark.slow
@pytest.mark.parametrize("released", [True, False])
def test_memory_stays_within_the_bound(monkeypatch, released):
    store = FakeStore((4096,) * 4, chunk=64)
    window, batch_rows, threads = 8, 128, 3
    row_bytes = (
        WIDTHS[IN] + WIDTHS[OUT]
    ) * 4 + 8  # including the positions; orders are NumPy arrays
    bound = (2 * window * 64 + threads * 64 + 3 * batch_rows) * row_bytes
    bound += 2 * sum(store.sizes)  # positions, which fit 16 bits
    seen: list[int] = []
    lease, outside = BufferPool.lease, live_bytes()

    def weigh(self, rows):
        leased = lease(self, rows)
        seen.append(live_bytes() - outside)
        return leased

    monkeypatch.setattr(BufferPool, "lease", weigh)  # memory peaks right after a lease
    with make(store, batch_rows=batch_rows, window=window, threads=threads) as loader:
        batches = islice(loader.batches(), 60)
        for batch in release_after_use(batches) if released else batches:
            assert batch.rows == batch_rows
    assert len(seen) > 40
    assert max(seen) <= bound


def live_bytes() -> int:
    """Bytes of all tensors and of memory that waits to be leased again."""
    items = gc.get_objects()
    storages = [item.untyped_storage() for item in items if type(item) is torch.Tensor]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes.values()) + sum(p.free_bytes for p in items if type(p) is BufferPool)


@settings(deadline=None, max_examples=20)
@given(stores, st.integers(1, 9), st.integers(1, 6), st.sets(st.integers(0, 24)))
def test_released_batches_change_no_other_batch(store, batch_rows, window, releases):
    with make(store, batch_rows=batch_rows, window=window) as loader:
        expected = [numbers(batch) for batch in islice(loader.batches(), 25)]
        kept = {}
        for index, batch in enumerate(islice(loader.batches(), 25)):
            assert numbers(batch) == expected[index]
            if index in releases:
                batch.release()
            else:
                kept[index] = batch
        assert all(numbers(batch) == expected[index] for index, batch in kept.items())


def pool_of_bytes():
    """A pool of rows of one byte."""
    return BufferPool({POSITION: Column(torch.uint8, None, lambda chunk, out: None)})


def address(lease):
    return lease.rows[POSITION].data_ptr()


def test_only_released_memory_is_leased_again():
    pool = pool_of_bytes()
    first, second = pool.lease(1000), pool.lease(1000)
    first.rows[POSITION].fill_(1)
    second.rows[POSITION].fill_(2)
    second.release()
    second.release()  # a second call does nothing
    third, fourth = pool.lease(900), pool.lease(900)
    assert address(third) == address(second)
    assert address(fourth) not in (address(first), address(third))
    third.rows[POSITION].fill_(3)
    fourth.rows[POSITION].fill_(4)
    assert (first.rows[POSITION] == 1).all()
    assert (third.rows[POSITION] == 3).all()


def test_a_pool_drops_memory_that_has_become_too_small():
    pool = pool_of_bytes()
    pool.lease(1000).release()
    assert pool.free_bytes == 1000
    pool.lease(2000).release()
    assert pool.free_bytes == 2000


def test_the_order_digest_distinguishes_orders():
    def digest(sizes=(8, 8), **options):
        with make(FakeStore(sizes), **options) as loader:
            return loader.order_digest

    assert digest() == digest(batch_rows=3)
    assert len({digest(), digest(seed=1), digest(window=3), digest(sizes=(8, 9))}) == 4


def test_messages_name_the_remedy():
    with pytest.raises(ValueError, match=r"no train rows of layers\.0:input, layers\.0:output; "):
        make(FakeStore(()))


@pytest.mark.parametrize(("window_rows", "chunks"), [(1, 1), (4, 1), (7, 1), (8, 2)])
def test_a_window_holds_whole_chunks_and_at_least_one(window_rows, chunks):
    with Loader(
        FakeStore((8,), chunk=4), [OUT], "train",
        batch_rows=1, seed=0, window_rows=window_rows, device=CPU,
    ) as loader:  # fmt: skip
        assert loader.window == chunks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_the_same_on_a_gpu():
    store = FakeStore((40, 13), dtype="bfloat16")
    with make(store) as here, make(store, device=torch.device("cuda")) as there:
        for a, b in islice(zip(here.batches(), there.batches(), strict=True), 30):
            assert b.positions_B.is_cuda
            torch.testing.assert_close(b.values[OUT].cpu(), a.values[OUT], rtol=0, atol=0)
            torch.testing.assert_close(b.positions_B.cpu(), a.positions_B, rtol=0, atol=0)
