"""Statistics of train rows from which coders start."""

from pathlib import Path

import pytest
import torch

from mptrain.data import loader
from mptrain.data.filters import Filters
from mptrain.data.loader import open_store
from mptrain.training.geometric_median import geometric_median
from mptrain.training.train_sample import TrainSample
from tests.helpers.stores import small_store

SIDES = ("layers.1.mlp", "input"), ("layers.1.mlp", "output")


def test_coders_of_the_same_sides_share_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(small_store(tmp_path)[0]))
    passes = []
    one_pass = loader.Loader.one_pass
    monkeypatch.setattr(
        loader.Loader, "one_pass", lambda self, *a: passes.append(1) or one_pass(self, *a)
    )
    sample = TrainSample(Filters(norm_limits={}), store)
    first = sample.variances(SIDES), sample.medians(SIDES)
    again = sample.variances(SIDES), sample.medians(SIDES)
    assert len(passes) == 2
    assert first[0] == again[0]
    for variance, median, own in zip(*first, _train_rows(store), strict=True):
        assert variance == pytest.approx(float(own.double().var(0, correction=0).mean()), rel=1e-5)
        torch.testing.assert_close(median, geometric_median(own), rtol=1e-3, atol=1e-4)


def _train_rows(store: loader.Store) -> list[torch.Tensor]:
    """All train rows of both sides, which are fewer than a sample has."""
    with loader.Loader(
        store, SIDES, "train", batch_rows=10**6, seed=1, device=torch.device("cpu")
    ) as one:
        (batch,) = one.one_pass()
        return [batch.values[side].float() for side in SIDES]
