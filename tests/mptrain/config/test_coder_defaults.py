"""Defaults that depend on the coder, and what a run records of them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Optimizer, Schedule
from mptrain.config.sides import Kind
from mptrain.runs.fit import fit
from mptrain.runs.run_dir import recorded_coders
from tests.helpers.fits import config, interrupt_at, weights
from tests.helpers.stores import small_store

RUN = {"run_rows": 64_000, "batch_rows": 100}


def coder(kind: Kind = "sae", **changes: Any) -> CoderConfig:
    source, target = ("h:input", "h:output") if kind != "sae" else ("h:output", "h:output")
    return CoderConfig(
        inputs=(source,), targets=(target,), kind=kind, arch="topk", k=2, expansion=2, **changes
    )


@pytest.mark.parametrize(
    ("kind", "given", "optimizer", "warmup_share", "schedule"),
    [
        ("sae", {}, "adam", 0.1, "linear"),
        ("transcoder", {}, "muon", 0.02, "linear"),
        ("skip-transcoder", {}, "muon", 0.02, "linear"),
        ("sae", {"optimizer": "muon"}, "muon", 0.02, "linear"),
        ("skip-transcoder", {"optimizer": "adam"}, "adam", 0.1, "linear"),
        ("sae", {"optimizer": "signsgd"}, "signsgd", 0.02, "constant"),
        ("sae", {"warmup_share": 0.0, "schedule": "cosine"}, "adam", 0.0, "cosine"),
    ],
)
def test_optimizer_warm_up_and_schedule(
    kind: Kind, given: dict[str, Any], optimizer: Optimizer, warmup_share: float, schedule: Schedule
) -> None:
    settings = coder(kind, **given).resolved_settings(**RUN)
    assert (settings["optimizer"], settings["warmup_share"]) == (optimizer, warmup_share)
    assert settings["schedule"] == schedule


def test_a_latent_is_dead_after_a_share_of_the_run_but_not_within_a_few_batches() -> None:
    assert coder().resolved_dead_rows(64_000, 100) == 1000
    assert coder().resolved_dead_rows(64_000, 1000) == 4000
    assert coder(dead_rows=7).resolved_dead_rows(64_000, 1000) == 7


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("store"))[0])


@pytest.fixture
def start(store: str, tmp_path: Path) -> Callable[..., Path]:
    def begin(name: str, step: int | None = None) -> Path:
        run = config(store, tmp_path / name, dead_rows=None)
        if step is None:
            fit(run)
        else:
            with pytest.raises(KeyboardInterrupt):
                fit(run, on_step=interrupt_at(step))
            fit(run)
        return tmp_path / name

    return begin


def test_run_and_coders_record_the_defaults_and_a_continued_run_keeps_its_bits(
    start: Callable[..., Path],
) -> None:
    whole, stopped = start("whole"), start("stopped", 13)
    assert all((weights(stopped)[n] == tensor).all() for n, tensor in weights(whole).items())
    manifest = json.loads((whole / "config.json").read_text())
    for name, settings in manifest["resolved"].items():
        trained = json.loads((whole / "coders" / name / "coder.json").read_text())["trained"]
        rate = manifest["learning_rates"][name]["value"]
        assert trained["resolved"] == {"lr": rate, **settings}
    assert {s["optimizer"] for s in manifest["resolved"].values()} == {"adam", "muon"}
    assert {s["dead_rows"] for s in manifest["resolved"].values()} == {4 * 64}


@pytest.mark.parametrize("change", ["a default", "a name", "no record"])
def test_a_run_of_a_version_with_other_defaults_is_refused(
    start: Callable[..., Path], change: str
) -> None:
    run = start("run")
    file = run / "config.json"
    manifest = json.loads(file.read_text())
    first = manifest["coders"][0]["name"]
    if change == "a default":
        manifest["resolved"][first]["optimizer"] = "muon"
    elif change == "no record":
        del manifest["resolved"]
    else:
        manifest["coders"][0]["warmup_share"] = 0.02
    file.write_text(json.dumps(manifest))
    read = (
        partial(recorded_coders, run)
        if change == "a name"
        else partial(fit, config(manifest["fit"]["store"], run, dead_rows=None))
    )
    with pytest.raises(UsageError, match="begun by a version of mptrain with other defaults; use"):
        read()
