"""Filters leave out the rows they name, and other coders do not change a coder's filters."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mpcache.store.acts_reader import ActsReader
from mpcache.store.reader import open_store
from mptrain.coders.coder import Coder
from mptrain.config.architectures import Arch
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_grid import FitConfig
from mptrain.data.columns import TOKEN, norm_of
from mptrain.data.filters import Filters, filters_from_json, make_filters, median_norm
from mptrain.data.loader import Batch, Loader, Store
from mptrain.evals.evaluate import evaluate, evaluate_coder
from mptrain.runs.fit import fit
from mptrain.training.normalization import TARGET_DEVIATION
from mptrain.training.setup import make_coder_run
from mptrain.training.train_sample import TrainSample
from tests.helpers.stores import small_store

IN, OUT = ("layers.1.mlp", "input"), ("layers.1.mlp", "output")
RESIDUAL = ("layers.0", "output")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(small_store(tmp_path_factory.mktemp("filters"))[0])


def config(store: Store, run: Path = Path("run"), **changes: object) -> FitConfig:
    settings = {
        "store": str(store.storage), "run": str(run), "hookpoints": ("layers.1.mlp",),
        "k": (3,), "expansion": (2,), "rows": 512, "batch_rows": 64, "window_rows": 128,
        "arch": ("topk",), "kind": ("sae", "skip-transcoder"), "device": "cpu",
    }  # fmt: skip
    return FitConfig(**{**settings, **changes})


def all_rows(store: Store, filters: Filters, sides=(IN, OUT)) -> Batch:
    with Loader(
        store, sides, "train", batch_rows=10_000, seed=0, device=torch.device("cpu"),
        row_fields=filters.row_fields,
    ) as loader:  # fmt: skip
        return next(loader.one_pass())


def test_facts_are_those_of_the_rows(store: Store) -> None:
    filters = Filters(skip_tokens=(1,), norm_limits={IN: 1.0, OUT: 1.0})
    batch = all_rows(store, filters)
    for side in (IN, OUT):
        norm_B = batch.values[side].float().norm(dim=1)
        torch.testing.assert_close(batch.fields[norm_of(side)], norm_B)
    actual, expected = {}, {}
    for position, token in zip(
        batch.positions_B.tolist(), batch.fields[TOKEN].tolist(), strict=True
    ):
        actual.setdefault(position, []).append(token)
    for part in store.parts([IN], "train"):
        for position, tokens in enumerate(store.tokens.read_tokens(part.number).T):
            expected.setdefault(position, []).extend(tokens.tolist())
    assert {p: sorted(t) for p, t in actual.items()} == {p: sorted(t) for p, t in expected.items()}


def test_each_filter_leaves_out_what_it_names(store: Store) -> None:
    tokens = (67, 71)
    limits = {side: median_norm(store, side) for side in (IN, OUT)}
    filters = Filters(skip_positions=2, skip_tokens=tokens, norm_limits=limits)
    batch = all_rows(store, filters)
    token_B = batch.fields[TOKEN].numpy()
    by_hand = {
        "position": batch.positions_B.numpy() >= 2,
        "token": ~np.isin(token_B, tokens),
        "input": batch.fields[norm_of(IN)].numpy() <= limits[IN],
        "output": batch.fields[norm_of(OUT)].numpy() <= limits[OUT],
    }
    assert all(0 < kept.sum() < len(kept) for kept in by_hand.values())
    both = np.logical_and.reduce(list(by_hand.values()))
    np.testing.assert_array_equal(filters.kept(batch, (IN, OUT)).numpy(), both)
    # an SAE of the output ignores the norm of a row on the input
    sae = by_hand["position"] & by_hand["token"] & by_hand["output"]
    np.testing.assert_array_equal(filters.kept(batch, (OUT, OUT)).numpy(), sae)
    assert filters.of((OUT, OUT)).norm_limits.keys() == {OUT}


def test_rows_that_are_not_finite_are_left_out_where_they_may_be() -> None:
    batch = Batch(
        offset=0,
        positions_B=torch.tensor([0, 1, 2, 3]),
        values={IN: torch.tensor([[1.0], [1], [torch.nan], [1]]),
                OUT: torch.tensor([[1.0], [1], [1], [torch.inf]])},
    )  # fmt: skip
    allowed = Filters(skip_positions=1, norm_limits={}, allow_nonfinite=True)
    assert allowed.usable(batch, [IN]).tolist() == [True, True, False, True]
    assert allowed.kept(batch, [IN]).tolist() == [False, True, False, True]
    assert allowed.kept(batch, [IN, OUT]).tolist() == [False, True, False, False]
    refused = Filters(norm_limits={})
    assert refused.kept(batch, [IN, OUT]).tolist() == [True] * 4


@pytest.mark.parametrize("arch", ["batch-topk", "batch-mp"])
def test_rows_left_out_do_not_change_the_evaluation_of_the_others(arch: Arch) -> None:
    """Also at another K, which keeps the strongest entries of many rows."""
    coder_config = CoderConfig(
        inputs=("h:output",), targets=("h:output",), kind="sae", arch=arch, k=3, expansion=4
    )
    coder = Coder(coder_config, 8, 8)
    generator = torch.Generator().manual_seed(0)
    coder.initialise_(torch.zeros(8), torch.zeros(8), generator)
    x_BD = torch.randn(40, 8, generator=generator)
    positions_B = torch.arange(40) % 4
    louder_BD = torch.where((positions_B < 2)[:, None], 100 * x_BD, x_BD)
    filters = Filters(skip_positions=2, norm_limits={})
    evaluations = [
        evaluate(
            [(coder, 5, coder_config.codes)],
            [Batch(offset=0, positions_B=positions_B, values={("h", "output"): rows_BD})],
            filters,
        )[0]
        for rows_BD in (x_BD, louder_BD)
    ]
    assert evaluations[0].rows == 20
    assert 0 < evaluations[0].l0 <= 5
    assert evaluations[0].fvu_all != evaluations[1].fvu_all
    assert (evaluations[0].fvu, evaluations[0].l0) == (evaluations[1].fvu, evaluations[1].l0)


def test_the_median_is_that_of_the_first_train_part(store: Store) -> None:
    x_RW = torch.cat([store.acts.read_chunk(*OUT, 0, chunk) for chunk in range(6)]).double()
    assert median_norm(store, OUT) == pytest.approx(float(x_RW.norm(dim=1).median()), rel=1e-6)
    limits = make_filters(config(store, max_norm=3.0), store, [OUT]).norm_limits
    assert limits == {OUT: 3 * median_norm(store, OUT)}
    assert median_norm(store.limited_to([0, 1]), OUT) == median_norm(store, OUT)


def test_rows_are_scaled_by_those_that_are_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments cover all rows, and a few excluded rows may enlarge them a million times."""
    moments = ActsReader.moments
    monkeypatch.setattr(ActsReader, "moments", lambda *of: tuple(1e6 * m for m in moments(*of)))
    run = config(store, skip_positions=3)
    filters = make_filters(run, store, [IN, OUT])
    for coder_config in run.coders():
        sample = TrainSample(filters, store)
        scale = make_coder_run(
            coder_config, run, sample, store, torch.device("cpu"), 0.01
        ).trainer.scale
        for side, factor in zip(coder_config.sides, scale, strict=True):
            batch = all_rows(store, filters, (side,))
            rows_ND = batch.values[side][filters.kept(batch, (side,))].double()
            deviation = factor * rows_ND.var(0, correction=0).mean().sqrt()
            is_target = coder_config.kind != "sae" and side == coder_config.target
            expected = TARGET_DEVIATION if is_target else 1
            assert deviation == pytest.approx(expected, rel=1e-5)


def test_filters_are_kept_beside_a_coder_and_used_in_its_evaluation(
    store: Store, tmp_path: Path
) -> None:
    chosen = config(
        store, tmp_path, max_norm=1.0, skip_tokens=("71", "special"), kind=("sae",),
        hookpoints=("layers.0", "layers.1.mlp"),
    )  # fmt: skip
    results = {result.coder: result.validation for result in fit(chosen)}
    for folder in (tmp_path / "coders").iterdir():
        trained = json.loads((folder / "coder.json").read_text())["trained"]
        filters = filters_from_json(trained)
        side = RESIDUAL if folder.name.startswith("layers.0-") else OUT
        assert filters == make_filters(chosen, store, [side])
        assert filters.skip_tokens == tuple(sorted({71, *store.special_ids}))
        (evaluation,) = evaluate_coder(folder, str(store.storage), [], device="cpu")
        validation = results[folder.name]
        assert validation is not None
        assert evaluation.rows == validation.rows
        # batches of another size, so that sums are rounded elsewhere
        assert (evaluation.fvu, evaluation.fvu_all) == pytest.approx(
            (validation.fvu, validation.fvu_all), rel=1e-9
        )
        everything = sum(part.rows for part in store.parts([side], "validation"))
        assert 0 < evaluation.rows < 0.6 * everything
        assert evaluation.fvu != evaluation.fvu_all


def test_companions_change_no_filter(store: Store, tmp_path: Path) -> None:
    strict = {"max_norm": 1.0, "skip_tokens": ("71",)}
    together = fit(config(store, tmp_path / "together", **strict))
    alone = fit(config(store, tmp_path / "alone", kind=("sae",), **strict))
    assert together[0].validation == alone[0].validation
    assert together[0].validation.rows > together[1].validation.rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_norm": 0.5}, "max_norm must be at least 1 and finite, got 0.5"),
        ({"max_norm": math.nan}, "it is a multiple of the median norm"),
        ({"skip_tokens": ("bos",)}, "skip_tokens must be token ids or the word special, got 'bos'"),
    ],
)
def test_invalid_filters(store: Store, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(store, **changes)


def test_a_store_without_its_special_tokens_is_refused(store: Store) -> None:
    older = open_store(store.storage)
    del older.provenance["tokenizer"]
    with pytest.raises(ValueError, match="give their token ids to --skip-tokens instead"):
        make_filters(config(older, skip_tokens=("special",)), older, [OUT])
