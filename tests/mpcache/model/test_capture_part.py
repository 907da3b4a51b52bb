"""Rows of a part are the model's values in permuted order, for every kind of copy to the host."""

import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpcache.collection.commit_threads import PartCommitter, lower_priority
from mpcache.collection.producer import empty_rows
from mpcache.model.capture_part import Copy, capture_part, scatter_
from mpcache.model.cut_batches import Batch, piece_batches, piece_tokens
from mpcache.model.hookpoint_patterns import Side, resolve_sides
from mpcache.model.hooks import Capture
from mpcache.model.host_transfer import HostTransfer
from tests.helpers.models import captured, tiny_model

PATTERNS = ["layers.0", "layers.1.mlp"]
TOKENS = torch.randint(0, 250, (7, 6), generator=torch.Generator().manual_seed(0))


def read_part(
    device: str, order_R: np.ndarray, dtype: torch.dtype, copy: Copy | None = None
) -> dict[Side, Tensor]:
    """The rows of TOKENS, three sequences at a time."""
    model = tiny_model().to(device)
    sides = resolve_sides(PATTERNS, model)
    buffers = {side: empty_rows(TOKENS.numel(), 16, dtype) for side in sides}
    yields: list[int] = []
    with Capture(model, sides) as capture:
        firsts = range(0, TOKENS.numel(), 3 * TOKENS.shape[1])
        batches = (
            Batch({"input_ids": batch.to(device)}, np.arange(first, first + batch.numel()))
            for first, batch in zip(firsts, TOKENS.split(3), strict=True)
        )
        capture_part(capture, batches, order_R, buffers, yields.append, copy)
    assert yields == [18, 18, 6]
    return buffers


def expected(order_R: np.ndarray, dtype: torch.dtype) -> dict[Side, Tensor]:
    model = tiny_model()
    with Capture(model, resolve_sides(PATTERNS, model)) as capture:
        values = [captured(capture, {"input_ids": batch}) for batch in TOKENS.split(3)]
    return {
        side: torch.cat([by_side[side].flatten(0, 1) for by_side in values])[order_R].to(dtype)
        for side in values[0]
    }


class Late:
    """Copies that arrive only on waiting, as copies from a GPU may."""

    def __init__(self) -> None:
        self.flying = self.most = 0

    def start(self, values: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        content = values.to(dtype, copy=True)
        host = torch.full_like(content, float("nan"))
        self.flying += 1
        self.most = max(self.most, self.flying)

        def arrived() -> Tensor:
            self.flying -= 1
            return host.copy_(content)

        return arrived


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_the_models_own_in_the_order_asked_for(dtype: torch.dtype) -> None:
    order_R, late = np.random.default_rng(0).permutation(TOKENS.numel()), Late()
    wanted = expected(order_R, dtype)
    for copy in (None, late.start):
        actual = read_part("cpu", order_R, dtype, copy)
        assert list(actual) == list(wanted)
        assert all(torch.equal(actual[side], wanted[side]) for side in wanted)
    assert late.flying == 0
    assert late.most == 2 * len(wanted), "two batches of every side are on their way at most"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_beside_the_computation_are_those_that_wait(dtype: torch.dtype) -> None:
    device, order_R = torch.device("cuda", 0), np.random.default_rng(0).permutation(TOKENS.numel())
    waited = read_part("cuda", order_R, dtype)
    for _ in range(20):
        actual = read_part("cuda", order_R, dtype, HostTransfer(device).start)
        assert all(torch.equal(actual[side], waited[side]) for side in waited)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_the_gpu_does_next_does_not_change_a_copy() -> None:
    start = HostTransfer(torch.device("cuda", 0)).start
    x = torch.arange(1 << 22, device="cuda", dtype=torch.float32)
    arrivals = []
    for _ in range(8):
        arrivals.append(start(x, torch.float32))
        x.add_(1)
        torch.full_like(x, -1.0)  # would take memory that was released too early
    for step, arrived in enumerate(arrivals):
        assert torch.equal(arrived(), torch.arange(1 << 22) + float(step))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    dtypes=st.sampled_from(
        [(a, b) for a in (torch.float32, torch.bfloat16) for b in (torch.float16, torch.float32)]
    ),
    strided=st.booleans(),
    data=st.data(),
)
def test_scatter_is_an_indexed_assignment(
    rows: int, width: int, dtypes: tuple[torch.dtype, ...], strided: bool, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, rows))
    at = np.random.default_rng(rows).permutation(rows)[:count]
    x_RW = torch.randn(width, count).mT if strided else torch.randn(count, width)
    buffer = torch.randn(rows, width).to(dtypes[1])
    wanted = buffer.clone()
    wanted[torch.from_numpy(at)] = x_RW.to(dtypes[0]).to(dtypes[1])
    scatter_(buffer, at, x_RW.to(dtypes[0]))
    assert torch.equal(buffer, wanted)


# --- lone documents ---


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    sequences=st.integers(1, 4),
    is_padding_allowed=st.booleans(),
)
def test_batches_of_pieces_have_each_piece_once(
    lengths: list[int], sequences: int, is_padding_allowed: bool
) -> None:
    most = sequences * 9
    batches = list(piece_batches(lengths, most, is_padding_allowed))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[piece] for piece in batch]
        assert max(sizes) * len(sizes) <= most
        assert is_padding_allowed or len(set(sizes)) == 1
    longest = [max(lengths[piece] for piece in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True), "the first batch takes the most memory"


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), fill=st.integers(0, 20))
def test_rows_of_pieces_cover_the_true_tokens(lengths: list[int], fill: int) -> None:
    rows = sum(lengths)
    starts = np.zeros(rows + fill, np.bool_)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    pieces = piece_tokens(starts[None], rows)
    assert [len(piece) for piece in pieces] == lengths
    assert np.array_equal(np.concatenate(pieces), np.arange(rows))


# --- writing beside the model ---


def test_threads_work_on_one_part_at_a_time() -> None:
    active, most, log = 0, 0, []
    lock, both = threading.Lock(), threading.Barrier(2, timeout=10)

    def work(part: int) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        both.wait()  # a single thread would wait here for ever
        with lock:
            active -= 1
            log.append(part)

    with PartCommitter(2) as committer:
        for part in range(3):
            committer.submit([partial(work, part), partial(work, part)])
    assert most == 2
    assert log == [0, 0, 1, 1, 2, 2], "a part's work waits for that of the part before"


def test_a_failure_is_raised_when_the_other_work_is_done() -> None:
    done = []

    def late() -> None:
        time.sleep(0.1)
        done.append(1)

    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), PartCommitter(2) as committer:
        committer.submit([fail, late])
    assert done == [1]


def test_a_thread_that_yields_computes_alone() -> None:
    results = []

    def look() -> None:
        lower_priority()
        results.append(torch.get_num_threads())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert results == [1]
