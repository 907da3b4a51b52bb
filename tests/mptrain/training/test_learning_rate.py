"""The default rate is the rule fitted to the table of searches, and a run keeps its rate."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.learning_rate_rule import FACTORS, fit_rules, read_optima
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_settings import Optimizer
from mptrain.runs.fit import fit
from mptrain.training import learning_rate as module
from mptrain.training.learning_rate import RULES, EncoderClass, Family, learning_rate
from tests.helpers.fits import config, interrupt_at, weights
from tests.helpers.paths import PROJECT
from tests.helpers.stores import small_store

TABLE = PROJECT / "docs" / "data" / "learning_rates.csv"
SIDE = ("layers.3:output",)
CODER = CoderConfig(inputs=SIDE, targets=SIDE, kind="sae", arch="topk", k=16, latents=2048)


def test_the_constants_are_those_of_the_fit() -> None:
    fitted = fit_rules(read_optima(TABLE))
    groups = [("adam", "sae"), ("muon", "sae"), ("muon", "transcoder")]
    assert fitted.keys() == {(*group, name) for group in groups for name in ("pursuit", "linear")}
    for group, rule in fitted.items():
        code = RULES[group]
        for name in FACTORS:
            assert getattr(code, name) == pytest.approx(rule.exponents[name], abs=0.006)
        assert rule.constants.keys() & {"mp", "topk"}
        for arch, constant in rule.constants.items():
            assert code.constants[arch] == pytest.approx(constant, rel=0.01)


def test_the_rule_costs_little_on_every_search_of_the_fit() -> None:
    optima = read_optima(TABLE)
    rules = fit_rules(optima)
    assert all(sum(o.group == group for o in optima) >= 8 for group in rules)
    costs = [
        o.cost(rules[o.group].log_lr(o)) for o in optima if o.group in rules and not o.is_nested
    ]
    assert max(costs) < 0.03


@pytest.mark.parametrize(("optimizer", "family", "encoder"), list(RULES))
def test_the_rate_is_a_product_of_powers(
    optimizer: Optimizer, family: Family, encoder: EncoderClass
) -> None:
    rule = RULES[optimizer, family, encoder]
    arch = {"pursuit": "mp", "linear": "topk"}[encoder]

    def rate(width: int = 256, rows: int = 1024, steps: int = 1000, **changes: object) -> float:
        settings = {"optimizer": optimizer, "kind": family, "arch": arch, **changes}
        coder = CoderConfig(**{**vars(CODER), **settings})
        return learning_rate(coder, width, rows, steps).value

    close = {"rel": 0.06}  # two digits of each rate
    assert rate(steps=8000) / rate() == pytest.approx(8**rule.steps, **close)
    assert rate(rows=4096) / rate() == pytest.approx(4**rule.batch_rows, **close)
    assert rate(latents=16384) / rate() == pytest.approx(8**rule.latents, **close)
    assert rate(k=64) / rate() == pytest.approx(4**rule.k, **close)
    below = 1 if encoder == "linear" else 4**-rule.k
    assert rate(k=4) / rate() == pytest.approx(below, **close)
    assert rate(width=1024) / rate() == pytest.approx(1 / 2, **close)


def test_a_given_rate_is_kept() -> None:
    coder = CoderConfig(**{**vars(CODER), "lr": 0.0123456})
    assert learning_rate(coder, 256, 1024, 100) == module.LearningRate(0.0123456, "given")


def test_the_reason_names_what_the_rule_depends_on() -> None:
    reason = learning_rate(CODER, 256, 1024, 250).reason
    assert reason == (
        "rule for plain (TopK), sae, adam, 2,048 latents, K 16, 1,024 rows a step, 250 steps"
    )


def test_the_reason_names_sizes_that_no_search_had() -> None:
    reason = learning_rate(CODER, 4096, 1024, 100_000).reason
    assert reason.endswith("100,000 steps; extrapolated in width, steps")
    assert "extrapolated" not in learning_rate(CODER, 576, 64, 125).reason


def test_a_continued_run_keeps_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a later version has another rule."""
    store = str(small_store(tmp_path)[0])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(config(store, whole), quiet=False)
    manifest = json.loads((whole / "config.json").read_text())
    printed = capsys.readouterr().err
    assert len(manifest["learning_rates"]) == 4
    for rate in manifest["learning_rates"].values():
        assert f"lr {rate['value']:.2g}: {rate['reason']}" in printed
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, stopped), on_step=interrupt_at(12))
    faster = {
        key: replace(rule, constants={arch: 2 * value for arch, value in rule.constants.items()})
        for key, rule in RULES.items()
    }
    monkeypatch.setattr(module, "RULES", faster)
    fit(config(store, stopped))
    assert all((weights(stopped)[n] == tensor).all() for n, tensor in weights(whole).items())
