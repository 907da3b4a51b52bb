"""The plan of a collection: what it wants of a store, and what is missing there."""

from pathlib import Path

import pytest

from mpcache.collection.collect import collect
from mpcache.collection.wanted_parts import CollectionPlan
from mpcache.model.hookpoint_patterns import Side
from mpcache.parallel.config import Share
from mpcache.store.reader import Store, open_store
from tests.helpers.stores import small_config

SIDES = (Side("layers.0", "output"), Side("layers.1", "output"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four parts of layers.0; layers.1 was never asked for, and part 2 lost its mark."""
    folder: Path = tmp_path_factory.mktemp("plan")
    collect(small_config(folder, rows=700, hookpoints=("layers.0",)), folder / "store")
    (folder / "store/marks/2/layers.0/output.json").unlink()
    return open_store(folder / "store")


def test_jobs_are_what_parts_lack(store: Store) -> None:
    parts = store.part_numbers("tokens")
    assert parts == (0, 1, 2, 3)
    plan = CollectionPlan(SIDES[:1], 4)
    (job,) = plan.jobs(store)
    assert (job.part, job.sides) == (2, SIDES[:1])
    assert job.rows == store.mark(2, "tokens").rows
    assert plan.complete_parts(store) == (0, 1, 3)
    assert [j.sides for j in CollectionPlan(SIDES, 4).jobs(store)] == [
        SIDES if part == 2 else SIDES[1:] for part in parts
    ]


def test_a_share_has_only_its_parts(store: Store) -> None:
    shares = [CollectionPlan(SIDES, 4, Share(i, 2)) for i in (1, 2)]
    assert [[job.part for job in plan.jobs(store)] for plan in shares] == [[0, 2], [1, 3]]


def test_a_plan_is_complete_when_no_part_and_no_tokens_are_missing(store: Store) -> None:
    assert CollectionPlan(SIDES[:1], 2).is_complete(store)
    assert not CollectionPlan(SIDES[:1], 4).is_complete(store), "part 2"
    assert not CollectionPlan(SIDES, 2).is_complete(store), "layers.1"
    assert not CollectionPlan((), 9).is_complete(store), "tokens of parts 4 to 8"
