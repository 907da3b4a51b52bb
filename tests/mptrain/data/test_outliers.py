"""A run says when a few rows outweigh all others, and names the filter that leaves them out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpcache.store.acts_reader import ActsReader
from mpcache.store.reader import open_store
from mptrain.config.coder_grid import FitConfig
from mptrain.data.filters import Filters, make_filters
from mptrain.data.loader import Store
from mptrain.data.outliers import outlier_warnings
from mptrain.runs.fit import fit
from tests.helpers.stores import small_store

SIDE = ("layers.1.mlp", "output")
FEW = 7  # rows that are not first tokens
Choice = Callable[[Store, int], Tensor]


def first_tokens(store: Store, part: int) -> Tensor:
    return store.tokens.read_positions(part) == 0


def special_tokens(store: Store, part: int) -> Tensor:
    assert store.special_ids
    return torch.isin(store.tokens.read_token_ids(part), torch.tensor(list(store.special_ids)))


def some_rows(store: Store, part: int) -> Tensor:
    ordinary_N = ~first_tokens(store, part) & ~special_tokens(store, part)
    return torch.zeros_like(ordinary_N).index_fill_(0, ordinary_N.nonzero()[:FEW, 0], True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(small_store(tmp_path_factory.mktemp("outliers"))[0])


@pytest.fixture
def make_massive(monkeypatch: pytest.MonkeyPatch) -> Callable[[Store, Choice], None]:
    """Give rows of a choice a thousand times their norm."""

    def change(store: Store, choice: Choice) -> None:
        read = ActsReader.read_norms

        def read_norms(acts: ActsReader, hookpoint: str, side: str, part: int) -> Tensor:
            norms_N = read(acts, hookpoint, side, part)
            return torch.where(choice(store, part), 1000 * norms_N, norms_N)

        monkeypatch.setattr(ActsReader, "read_norms", read_norms)

    return change


def config(store: Store, run: Path, **changes: object) -> FitConfig:
    settings = {
        "store": str(store.storage), "run": str(run), "hookpoints": ("layers.1.mlp",), "k": (3,),
        "expansion": (2,), "rows": 512, "batch_rows": 64, "kind": ("sae",), "device": "cpu",
        "skip_positions": 0, **changes,
    }  # fmt: skip
    return FitConfig(**settings)


def test_ordinary_rows_give_no_warning(store: Store) -> None:
    assert list(outlier_warnings(store, Filters(norm_limits={}), [SIDE])) == []


@pytest.mark.parametrize(
    ("choice", "remedy", "filters"),
    [
        (first_tokens, "--skip-positions 1", {"skip_positions": 1}),
        (special_tokens, "--skip-tokens special", {"skip_tokens": ("special",)}),
        (some_rows, "--max-norm 10", {"max_norm": 10.0}),
    ],
)
def test_the_filter_that_is_named_leaves_them_out(
    store: Store,
    make_massive: Callable[[Store, Choice], None],
    tmp_path: Path,
    choice: Choice,
    remedy: str,
    filters: dict[str, object],
) -> None:
    make_massive(store, choice)
    part = store.parts([SIDE], "train")[0].number
    massive_N, norms_N = choice(store, part), store.acts.read_norms(*SIDE, part).double()
    assert 0 < massive_N.sum() < len(massive_N) / 5
    shares = (
        f"{100 * float(massive_N.double().mean()):.2g} % of the rows have more than 10 times the "
        f"median norm and {100 * float(norms_N[massive_N].norm() / norms_N.norm()) ** 2:.3g} % of "
    )
    with pytest.warns(RuntimeWarning, match="little of the other rows") as caught:
        fit(config(store, tmp_path / "all"))
    (text,) = {str(w.message) for w in caught if "median norm" in str(w.message)}
    assert text.startswith(f"layers.1.mlp:output: {shares}")
    assert f"; {remedy} leaves them out" in text
    chosen = make_filters(config(store, tmp_path, **filters), store, [SIDE])
    assert list(outlier_warnings(store, chosen, [SIDE])) == []
