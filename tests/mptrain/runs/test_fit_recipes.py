"""Promises of recipes: the evaluated coder is the saved one, and a coder starts independently."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mptrain.config.coder_grid import FitConfig
from mptrain.evals.evaluate import evaluate_coder
from mptrain.runs.fit import fit
from tests.helpers import fits
from tests.helpers.stores import small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("recipes"))[0])


def config(store: str, run: Path, **changes: Any) -> FitConfig:
    return fits.config(store, run, **{"arch": ("mp",), "rows": 64 * 12, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "signsgd"},
        {"arch": ("batch-mp",)},
        {"optimizer": "signsgd", "arch": ("batch-mp",)},
    ],
    ids=str,
)
def test_the_saved_coder_is_the_evaluated_one(
    store: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The saved coder takes unscaled rows and has unit-norm atoms, unlike the coder in training."""
    results = fit(config(store, tmp_path / "run", **changes))
    trained, saved = fits.state(tmp_path / "run"), fits.weights(tmp_path / "run")
    assert any(not torch.equal(t, trained[n.replace("/", "/coder.")]) for n, t in saved.items())
    for result in results:
        folder = tmp_path / "run/coders" / result.coder
        (evaluation,) = evaluate_coder(folder, Path(store), ())
        assert evaluation.fvu == pytest.approx(result.validation.fvu, rel=1e-6)
        assert evaluation.l0 == result.validation.l0
        norm_M = saved[f"{result.coder}/encoder.W_MD"].double().norm(dim=1)
        torch.testing.assert_close(norm_M, torch.ones_like(norm_M), atol=3e-7, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": "signsgd"}, {"start": "median"}, {"normalise": False}],
    ids=str,
)
def test_watching_and_company_change_no_bit(
    store: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    watched = {"log_every": 1, "eval_every": 1, "save_every": 5}
    both = {"hookpoints": ("layers.0", "layers.1.mlp"), "kind": ("sae",), **changes}
    fit(config(store, tmp_path / "together", **both, **watched))
    alone: dict[str, torch.Tensor] = {}
    for hookpoint in both["hookpoints"]:
        run = tmp_path / hookpoint
        fit(config(store, run, **both | {"hookpoints": (hookpoint,)}))
        alone |= fits.weights(run)
    assert fits.equal(fits.weights(tmp_path / "together"), alone)


def test_start_changes_a_run(store: str, tmp_path: Path) -> None:
    fvus = [
        {r.validation.fvu for r in fit(config(store, tmp_path / start, start=start))}
        for start in ("mean", "median")
    ]
    assert fvus[0].isdisjoint(fvus[1])
