"""Thresholds of batch- coders give K latents a row, for every length and kind of training."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptrain.coders.checkpoint import load_coder, save_coder
from mptrain.coders.coder import Coder
from mptrain.config.coder import CoderConfig
from mptrain.config.sides import hookpoint_sides
from mptrain.data.filters import Filters, filters_from_json
from mptrain.data.loader import Batch, Loader, open_store
from mptrain.evals import thresholds
from mptrain.evals.evaluate import calibrate_thresholds_, evaluate, evaluate_coder
from mptrain.evals.thresholds import coder_at_k, first_entries, latent_strengths, set_thresholds_
from mptrain.runs.fit import fit
from mptrain.runs.results import l0_warnings
from tests.helpers.fits import config, equal, interrupt_at, weights
from tests.helpers.stores import small_store, write_corpus

ARCHS = ("batch-topk", "batch-mp")
SIDES = (("layers.0", "output"), ("layers.0", "output"))
NEAR = 0.05  # of K


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Enough held-out rows to measure an L0 within two hundredths."""
    folder = tmp_path_factory.mktemp("thresholds")
    write_corpus(folder / "corpus.jsonl", documents=200)
    return str(small_store(folder, rows=8_000, part_rows=480, hookpoints=("layers.0",))[0])


def batch_config(store: str, run: Path, steps: int = 87, **changes: Any) -> Any:
    settings = {
        "kind": ("sae",),
        "arch": ARCHS,
        "k": (4,),
        "expansion": (4,),
        "rows": 128 * steps,
        "batch_rows": 128,
    }
    settings |= {"hookpoints": ("layers.0",), "eval_every": 10_000, "dead_rows": 100_000}
    return config(store, run, **{**settings, **changes})


def l0_deviations(results: list[dict[str, Any]]) -> dict[str, float]:
    return {result.coder: result.validation.l0_deviation for result in results}


@pytest.mark.parametrize(
    "steps", [20, 87, *(pytest.param(n, marks=pytest.mark.slow) for n in (250, 1000))]
)
def test_held_out_l0_is_near_k_however_long_a_training_is(
    store: str, tmp_path: Path, steps: int
) -> None:
    # with Adam, 1000 steps overfit so small a store
    results = fit(batch_config(store, tmp_path / "run", steps, optimizer="muon"))
    assert all(abs(deviation) < NEAR for deviation in l0_deviations(results).values()), results
    assert not any(result.warnings for result in results)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "signsgd"},
        {"micro_batch_rows": 24},
        {"k": (2, 6)},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"optimizer": "adam"},
                {"nested": True},
                {"k_factor": 2.0, "k_decay_share": 0.5},
                {"normalise": False},
                {"select": "magnitude", "arch": ("batch-mp",)},
            )
        ),
    ],
    ids=str,
)
def test_held_out_l0_is_near_k_however_a_coder_is_trained(
    store: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    results = fit(batch_config(store, tmp_path / "run", **changes))
    assert all(abs(deviation) < NEAR for deviation in l0_deviations(results).values()), results


def test_another_k_has_a_threshold_of_its_own(store: str, tmp_path: Path) -> None:
    for result in fit(batch_config(store, tmp_path / "run")):
        folder = tmp_path / "run/coders" / result.coder
        own, fewer, more = evaluate_coder(folder, store, (2, 6))
        assert own.l0 == pytest.approx(result.validation.l0, rel=1e-3)
        assert [evaluation.k for evaluation in (own, fewer, more)] == [4, 2, 6]
        assert abs(fewer.l0_deviation) < NEAR
        assert abs(more.l0_deviation) < NEAR
        # a row's code does not depend on the rows that are coded with it
        coder = load_coder(folder)[0]
        x_BD = torch.randn(50, len(coder.b_D), generator=torch.Generator().manual_seed(0))
        together, apart = coder.encode(x_BD), coder.encode(x_BD[:7])
        assert torch.equal(together.idx_BK[:7] < 0, apart.idx_BK < 0)
        assert (apart.idx_BK < 0).any()
        assert (apart.idx_BK >= 0).any()


def test_a_threshold_of_another_k_comes_from_train_rows(store: str, tmp_path: Path) -> None:
    """Held-out rows, which would flatter the coder, decide nothing."""
    data, cpu = open_store(store), torch.device("cpu")
    settings: Mapping[str, Any] = {"kind": "sae", "arch": "batch-topk", "k": 4, "expansion": 4}
    width = data.width(*SIDES[0])
    coder = Coder(CoderConfig(**hookpoint_sides("layers.0", "sae"), **settings), width, width)
    coder.initialise_(torch.zeros(width), torch.zeros(width), torch.Generator().manual_seed(1))
    coder.batch_threshold.threshold = torch.tensor(1.0)
    trained = {"skip_positions": 0, "allow_nonfinite": False}
    save_coder(tmp_path / "coder", coder, {**trained, "store_fingerprint": data.fingerprint})
    filters, other = filters_from_json(trained), coder_at_k(coder, 2)
    read: Mapping[str, Any] = {"batch_rows": 8192, "seed": 0, "device": cpu}
    with Loader(data, SIDES[:1], "train", **read) as loader:
        calibrate_thresholds_([other], loader, filters)
    with Loader(data, SIDES[:1], "validation", **read) as loader:
        (expected,) = evaluate([(other, 2, other.config.codes)], loader.one_pass(), filters)
    (_, found) = evaluate_coder(tmp_path / "coder", store, (2,), device="cpu")
    assert found.l0 == expected.l0


@pytest.mark.slow
def test_thresholds_are_those_of_an_uninterrupted_run(store: str, tmp_path: Path) -> None:
    """Validations during the run, which set thresholds too, change no bit either."""
    fit(batch_config(store, tmp_path / "whole", 24, optimizer="signsgd"))
    with pytest.raises(KeyboardInterrupt):
        fit(
            batch_config(store, tmp_path / "stopped", 24, optimizer="signsgd"),
            on_step=interrupt_at(13),
        )
    fit(batch_config(store, tmp_path / "stopped", 24, optimizer="signsgd"))
    fit(batch_config(store, tmp_path / "observed", 24, optimizer="signsgd", eval_every=5))
    uninterrupted = weights(tmp_path / "whole")
    assert any(name.endswith("threshold") and tensor > 0 for name, tensor in uninterrupted.items())
    assert equal(uninterrupted, weights(tmp_path / "stopped"))
    assert equal(uninterrupted, weights(tmp_path / "observed"))


def test_a_coder_of_an_earlier_version_keeps_its_threshold(store: str, tmp_path: Path) -> None:
    """The coder keeps its threshold, and a warning names it as the reason if L0 is far from K."""
    (result,) = fit(batch_config(store, tmp_path / "run", 20, arch=("batch-topk",)))
    folder = tmp_path / "run/coders" / result.coder
    coder, trained = load_coder(folder)
    assert coder.batch_threshold.threshold is not None
    coder.batch_threshold.threshold = coder.batch_threshold.threshold * 1.5
    save_coder(folder, coder, {name: v for name, v in trained.items() if name != "step"})
    assert load_coder(folder)[0].batch_threshold.threshold == coder.batch_threshold.threshold
    (evaluation,) = evaluate_coder(folder, store, ())
    assert evaluation.l0_deviation < -NEAR
    (message,) = l0_warnings(folder, [evaluation])
    assert "an earlier version followed its threshold" in message


# --- the parts, against slow references ---


@given(seed=st.integers(0, 1000), latents=st.integers(1, 12), threshold=st.floats(0, 2))
def test_a_latent_is_in_its_row_up_to_its_strength(
    seed: int, latents: int, threshold: float
) -> None:
    random = np.random.default_rng(seed)
    idx_BK = random.integers(-1, latents, (5, 7))
    val_BK = np.where(idx_BK < 0, 0, random.normal(size=(5, 7)))
    strengths = latent_strengths(
        torch.from_numpy(idx_BK), torch.from_numpy(val_BK), is_pursuit=True
    )
    if threshold == 0:
        return
    for idx_K, val_K, strength_K in zip(idx_BK, val_BK, strengths, strict=True):
        kept: set[int] = set()
        for latent, value in zip(idx_K, val_K, strict=True):
            if abs(value) < threshold:
                break
            kept.add(int(latent))
        assert int((strength_K >= threshold).sum()) == len(kept)


@given(st.lists(st.lists(st.integers(-1, 4), min_size=6, max_size=6), min_size=1, max_size=4))
def test_first_entries(rows: list[list[int]]) -> None:
    expected = [
        [i >= 0 and i not in row[:position] for position, i in enumerate(row)] for row in rows
    ]
    assert first_entries(torch.tensor(rows)).tolist() == expected


def batch_of(x_BD: torch.Tensor, positions_B: torch.Tensor) -> Batch:
    return Batch(offset=0, positions_B=positions_B, values={SIDES[0]: x_BD})


def new_coder(arch: Any) -> Coder:
    settings: Mapping[str, Any] = {"kind": "sae", "k": 3, "latents": 20}
    coder = Coder(CoderConfig(arch=arch, **hookpoint_sides("layers.0", "sae"), **settings), 8, 8)
    coder.initialise_(torch.zeros(8), torch.zeros(8), torch.Generator().manual_seed(1))
    coder.batch_threshold.threshold = torch.tensor(7.0)
    return coder


@pytest.mark.parametrize("arch", ARCHS)
def test_k_latents_a_row_on_the_rows_that_decide(arch: Any, monkeypatch: Any) -> None:
    """The first rows that pass the filters decide; the existing tensor is not changed."""
    monkeypatch.setattr(thresholds, "THRESHOLD_ROWS", 70)
    coder, x_ND = new_coder(arch), torch.randn(120, 8)
    x_ND[::2] *= 100  # rows that the filters leave out would raise the threshold
    positions_N = torch.arange(120) % 2
    batches = [batch_of(x, p) for x, p in zip(x_ND.split(50), positions_N.split(50), strict=True)]
    before = coder.batch_threshold.threshold
    set_thresholds_([(coder, SIDES)], batches, Filters(skip_positions=1, norm_limits={}))
    assert before == 7
    code = coder.encode(x_ND[1::2])
    latents = [len({i for i in row if i >= 0}) for row in code.idx_BK.tolist()]
    assert sum(latents) == 3 * 60
    fewer = new_coder(arch)
    monkeypatch.setattr(thresholds, "THRESHOLD_ROWS", 20)
    set_thresholds_([(fewer, SIDES)], batches, Filters(skip_positions=1, norm_limits={}))
    latents = [len({i for i in r if i >= 0}) for r in fewer.encode(x_ND[1:40:2]).idx_BK.tolist()]
    assert sum(latents) == 3 * 20


@pytest.mark.parametrize("arch", ARCHS)
def test_without_rows_or_latents_nothing_is_cut(arch: Any) -> None:
    coder = new_coder(arch)
    set_thresholds_([(coder, SIDES)], [], Filters(norm_limits={}))
    assert coder.batch_threshold.threshold == 0
    dull = batch_of(torch.zeros(9, 8), torch.arange(9))
    set_thresholds_([(coder, SIDES)], [dull], Filters(norm_limits={}))
    assert coder.batch_threshold.threshold == 0


def test_another_k_shares_the_weights() -> None:
    coder = new_coder("batch-mp")
    other = coder_at_k(coder, 5)
    assert other.config == replace(coder.config, k=5)
    assert other.decoder_ME.data_ptr() == coder.decoder_ME.data_ptr()
