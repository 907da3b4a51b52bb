"""Laws of a run: interruptions, metrics and other coders change no bit of a coder."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mpcli.mptrain import app as mptrain
from mptrain.coders import checkpoint
from mptrain.coders.checkpoint import load_coder
from mptrain.config.coder_grid import FitConfig
from mptrain.config.coder_settings import Optimizer
from mptrain.config.sides import Side
from mptrain.data.atomic_files import write_json
from mptrain.data.filters import Filters
from mptrain.data.loader import Batch
from mptrain.evals.evaluate import Evaluation, evaluate_coder
from mptrain.runs import fit as fit_module
from mptrain.runs import validator
from mptrain.runs.fit import fit
from mptrain.runs.signals import Terminated
from mptrain.runs.step_records import peak_memory_bytes
from mptrain.training.setup import CoderRun
from tests.helpers.fits import config, equal, interrupt_at, lasting, spoil, state, weights
from tests.helpers.stores import small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("fit"))[0])


@pytest.fixture(scope="module")
def fitted(store: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the folder of a finished run with some settings; tests only read it."""

    @functools.cache
    def run_with(**changes: Any) -> Path:
        run = tmp_path_factory.mktemp("fitted") / "run"
        fit(config(store, run, **changes))
        return run

    return run_with


@pytest.mark.parametrize("optimizer", typing.get_args(Optimizer))
@pytest.mark.parametrize("stops_at", [1, 7, 23])
def test_interrupted_equals_uninterrupted(
    store: str, fitted: Callable[..., Path], tmp_path: Path, optimizer: str, stops_at: int
) -> None:
    uninterrupted = fitted(optimizer=optimizer)
    broken = config(store, tmp_path / "broken", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, on_step=interrupt_at(stops_at))
    fit(broken)
    assert equal(weights(uninterrupted), weights(tmp_path / "broken"))
    assert lasting(uninterrupted) == lasting(tmp_path / "broken")
    assert equal(state(uninterrupted), state(tmp_path / "broken"))


@pytest.mark.parametrize("optimizer", typing.get_args(Optimizer))
def test_watching_changes_no_bit(store: str, tmp_path: Path, optimizer: Any) -> None:
    often = {"log_every": 1, "eval_every": 1, "save_every": 1, "eval_rows": 50}
    seldom = {"log_every": 99, "eval_every": 99, "save_every": 99}
    for name, settings in (("often", often), ("seldom", seldom)):
        fit(config(store, tmp_path / name, **settings, optimizer=optimizer))
    assert equal(state(tmp_path / "often"), state(tmp_path / "seldom"))
    assert equal(weights(tmp_path / "often"), weights(tmp_path / "seldom"))
    assert len(lasting(tmp_path / "often")) > len(lasting(tmp_path / "seldom"))


def test_company_changes_no_bit(store: str, tmp_path: Path) -> None:
    together = {"hookpoints": ("layers.0", "layers.1.mlp"), "kind": ("sae",), "seed": (0, 1)}
    fit(config(store, tmp_path / "together", **together))
    together_weights = weights(tmp_path / "together")
    alone: dict[str, torch.Tensor] = {}
    for number, coder in enumerate(config(store, tmp_path, **together).coders()):
        run = tmp_path / str(number)
        solo = {
            "hookpoints": (coder.sides_name,),
            "arch": (coder.arch,),
            "seed": (coder.seed,),
        }
        fit(config(store, run, kind=("sae",), **solo))
        alone |= weights(run)
    assert equal(together_weights, alone)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": (1,)},
        {"order_seed": 1},
        {"window_rows": 32},
        {"lr": (0.01,)},
        {"warmup_share": 0.5},
        {"optimizer": "signsgd"},
        {"batch_rows": 32},
        {"rows": 64 * 20},
        {"skip_positions": 3},
        {"skip_tokens": ("71",)},
        {"max_norm": 1.0},
        {"k": (2,)},
        {"expansion": (3,)},
        {"expansion": FitConfig.expansion, "latents": (40,)},
        {"kind": ("transcoder",)},
        {"tolerance": 0.9, "arch": ("mp",)},
        {"auxk_alpha": 0.0, "dead_rows": 1, "arch": ("topk",)},
        {"auxk_alpha": 0.0, "dead_rows": 1, "arch": ("mp",)},
        {"dead_rows": 1, "arch": ("topk",)},
        {"backend": "shortlist", "shortlist_size": 2, "arch": ("mp",)},
    ],
    ids=str,
)
def test_every_option_changes_the_coders(
    store: str, fitted: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    base = {"arch": changes.get("arch", ("mp", "topk"))}
    if "auxk_alpha" in changes:
        base["dead_rows"] = 1
    results = json.loads((fitted(**base) / "results.json").read_text())
    before = {result["validation"]["fvu"] for result in results}
    after = fit(config(store, tmp_path / "other", **{**base, **changes}))
    assert before.isdisjoint(result.validation.fvu for result in after)


def test_back_ends_agree_but_are_named_apart(store: str, tmp_path: Path) -> None:
    chosen = {"arch": ("mp",), "kind": ("sae",)}
    for backend in ("direct", "gram"):
        fit(config(store, tmp_path / backend, backend=backend, **chosen))
    direct, gram = (
        json.loads((tmp_path / n / "results.json").read_text())[0] for n in ("direct", "gram")
    )
    assert direct["coder"] != gram["coder"]
    assert direct["validation"]["fvu"] == pytest.approx(gram["validation"]["fvu"], rel=0.02)


def test_a_diverged_coder_stops_and_the_others_continue(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "well"))

    def spoil_first(step: int, coder_runs: Sequence[CoderRun]) -> None:
        if step == 1:
            spoil(coder_runs[0])

    results = fit(config(store, tmp_path / "ill"), on_step=spoil_first)
    assert [r.coder for r in results if r.diverged] == [
        "layers.1.mlp-sae-mp-k3-x2-seed0-dead-rows200"
    ]
    ill, well = weights(tmp_path / "ill"), weights(tmp_path / "well")
    assert len({name.split("/")[0] for name in ill}) == 3
    assert all(torch.equal(tensor, well[name]) for name, tensor in ill.items())
    json.loads((tmp_path / "ill" / "results.json").read_text(), parse_constant=pytest.fail)


def test_a_run_without_a_coder_left_ends(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def spoil_all(_: int, coder_runs: Sequence[CoderRun]) -> None:
        nonlocal steps
        steps += 1
        for coder_run in coder_runs:
            spoil(coder_run)

    monkeypatch.setattr(fit_module, "fit", partial(fit, on_step=spoil_all))
    fitted = ["fit", store, "--run", str(tmp_path / "run"), "--hookpoints", "layers.0", "--k", "3",
              "--expansion", "2", "--rows", "800", "--batch-rows", "64"]  # fmt: skip
    completed = CliRunner().invoke(mptrain, fitted)
    assert steps == 1
    assert completed.exit_code == 1
    assert "all coders diverged, so no coder was saved" in completed.stderr
    assert not completed.stdout
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [(r["diverged"], r["rows_read"]) for r in results] == [(True, 64)] * 2
    assert all(0 < r["rows_trained"] < 64 for r in results), "first positions are left out"
    assert {r.step for r in lasting(tmp_path / "run")} == {1}


def test_a_coder_without_validation_rows_is_saved(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = validator.evaluate

    def of_no_rows(*arguments: Any) -> list[Evaluation]:
        return [dataclasses.replace(e, rows=0, fvu=math.nan, l0=0.0) for e in evaluate(*arguments)]

    monkeypatch.setattr(validator, "evaluate", of_no_rows)
    fitted = ["fit", store, "--run", str(tmp_path / "run"), "--hookpoints", "layers.0", "--k", "3",
              "--expansion", "2", "--rows", "800", "--batch-rows", "64"]  # fmt: skip
    completed = CliRunner().invoke(mptrain, fitted)
    assert completed.exit_code == 0, completed.output
    assert "no validation row passes the filters of layers.0-sae-mp" in completed.stderr
    assert "diverged" not in completed.stderr
    assert len(list((tmp_path / "run/coders").iterdir())) == 2


def test_a_run_of_an_earlier_version_continues(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", rows=64))
    file = tmp_path / "run/config.json"
    about = json.loads(file.read_text())
    del about["parts"]
    file.write_text(json.dumps(about))
    fit(config(store, tmp_path / "run", rows=64))


def test_training_explains_more_and_atoms_keep_unit_norm(store: str, tmp_path: Path) -> None:
    results = fit(config(store, tmp_path / "run", rows=64 * 200, eval_every=5))
    for result in results:
        name = result.coder
        course = [r.validation_fvu for r in lasting(tmp_path / "run") if r.coder == name]
        course = [fvu for fvu in course if fvu is not None]
        assert course[-1] < 0.9 * course[0]
        coder, trained = load_coder(tmp_path / "run" / "coders" / name)
        assert trained["coder"] == name
        for unit in coder.unit_norm:
            norms = coder.get_parameter(unit).norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_saved_batch_mp_coder_keeps_its_threshold(store: str, tmp_path: Path) -> None:
    (result,) = fit(config(store, tmp_path / "run", arch=("batch-mp",), kind=("sae",)))
    coder, _ = load_coder(tmp_path / "run" / "coders" / result.coder)
    assert coder.batch_threshold.threshold is not None
    assert coder.batch_threshold.threshold > 0
    assert 1 < result.validation.l0 < 6, "near k = 3, and not all of 2 k steps"
    assert evaluate_coder(tmp_path / "run/coders" / result.coder, Path(store), ())[0].l0 == (
        pytest.approx(result.validation.l0, rel=1e-3)
    )


def test_damaged_and_foreign_coders_are_refused(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", arch=("mp",), kind=("sae",)))
    (folder,) = (tmp_path / "run" / "coders").iterdir()
    with pytest.raises(ValueError, match="holds no coder"):
        load_coder(tmp_path)
    data = (folder / "coder.safetensors").read_bytes()
    (folder / "coder.safetensors").write_bytes(data[:-8])
    with pytest.raises(ValueError, match="damaged"):
        load_coder(folder)
    about = json.loads((folder / "coder.json").read_text())
    (folder / "coder.json").write_text(json.dumps({**about, "format_version": 3}))
    with pytest.raises(ValueError, match="coder format version 3"):
        load_coder(folder)


@pytest.mark.parametrize("stops_at", [1, 7, 10, 24])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_keeps_its_state(
    store: str,
    fitted: Callable[..., Path],
    tmp_path: Path,
    number: signal.Signals,
    stops_at: int,
) -> None:
    calls = 0

    def press(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stops_at:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(config(store, tmp_path / "broken"), on_step=press)
    assert stopped.type is (KeyboardInterrupt if number == signal.SIGINT else Terminated)
    assert [f.name for f in (tmp_path / "broken/state").iterdir()] == [str(stops_at)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    fit(config(store, tmp_path / "broken"), on_step=press)
    assert calls == 24
    assert equal(weights(fitted()), weights(tmp_path / "broken"))
    assert lasting(fitted()) == lasting(tmp_path / "broken")


def test_a_second_ctrl_c_stops_at_once(store: str, tmp_path: Path) -> None:
    def press_twice(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run"), on_step=press_twice)
    assert not (tmp_path / "run/state").exists()


def test_a_run_whose_first_write_was_cut_can_begin(store: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json.partial").write_text("{")
    fit(config(store, tmp_path / "run", rows=64))


def test_a_batch_without_rows_is_no_divergence(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Filters.kept

    def none_at_first(filters: Filters, batch: Batch, sides: Sequence[Side]) -> torch.Tensor:
        return keep(filters, batch, sides) & (batch.offset > 0)

    monkeypatch.setattr(Filters, "kept", none_at_first)
    results = fit(config(store, tmp_path / "run", log_every=1))
    assert not any(result.diverged for result in results)
    assert all(math.isnan(r.fvu) for r in lasting(tmp_path / "run") if r.step == 1)
    assert all(math.isfinite(r.fvu) for r in lasting(tmp_path / "run") if r.step == 2)


def test_a_final_fvu_that_is_no_number_is_a_divergence(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = validator.evaluate

    def spoilt(*args: Any, **kwargs: Any) -> list[Evaluation]:
        first, *rest = evaluate(*args, **kwargs)
        return [dataclasses.replace(first, fvu=math.inf), *rest]

    monkeypatch.setattr(validator, "evaluate", spoilt)
    results = fit(config(store, tmp_path / "run"))
    assert [r.diverged for r in results] == [True, False, False, False]
    assert len(list((tmp_path / "run/coders").iterdir())) == 3
    json.loads((tmp_path / "run/results.json").read_text(), parse_constant=pytest.fail)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", math.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_positions": -1}, "skip_positions must be at least 0, got -1"),
        ({"order_seed": -1}, "order_seed must be at least 0, got -1"),
        ({"lr": (0.0,)}, "lr must be positive and finite, got 0.0"),
        ({"lr": (math.nan,)}, "lr must be positive and finite, got nan"),
        ({"auxk_alpha": -0.5}, "auxk_alpha must be at least 0 and finite, got -0.5"),
        ({"hookpoints": ()}, "hookpoints is empty"),
        ({"kind": ()}, "kind is empty"),
        ({"arch": ()}, "arch is empty"),
        ({"k": ()}, "k is empty"),
        ({"expansion": ()}, "expansion is empty"),
        ({"seed": ()}, "seed is empty"),
        ({"lr": (1.0, 1.0)}, "lr must have each value only once, got 1.0,1.0"),
        ({"latents": (32,)}, "got latents=32, expansion=2; give one of them"),
        ({"latents": (0,), "expansion": (64,)}, "latents must be at least 1, got 0"),
        ({"lr": (0.1234567, 0.1234568)}, "a different name, got .*lr0.123457.* several times"),
        ({"k": (16, 16)}, "k must have each value only once, got 16,16"),
        ({"hookpoints": ("a", "b", "a")}, "hookpoints must have each value only once, got a,b,a"),
    ],
    ids=str,
)
def test_invalid_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("store", Path("run"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_positions": 16}, "skip_positions=16, ctx_len=16"),
        ({"device": "foo"}, "device 'foo' is not available on this machine"),
        ({"device": "cuda:99"}, "use --device auto or cpu"),
        ({"device": "meta"}, "use --device auto or cpu"),
    ],
    ids=str,
)
def test_invalid_fits_write_nothing(
    store: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fit(config(store, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_sides_of_different_extent_are_refused(tmp_path: Path) -> None:
    store = str(small_store(tmp_path, hookpoints=("layers.0",), rows=700)[0])
    small_store(tmp_path, hookpoints=("layers.1.mlp",), rows=300)
    both = {"hookpoints": ("layers.0", "layers.1.mlp"), "kind": ("sae",), "rows": 64}
    with pytest.raises(
        ValueError, match=r"layers\.0:output has parts 0-\d+; layers\.1\.mlp:output"
    ):
        fit(config(store, tmp_path / "run", **both))
    assert not (tmp_path / "run").exists()
    fit(config(store, tmp_path / "run", **both | {"hookpoints": ("layers.0",)}))


def test_a_run_continues_with_the_parts_it_began_with(tmp_path: Path) -> None:
    store = str(small_store(tmp_path, rows=300)[0])
    fit(config(store, tmp_path / "whole", rows=64 * 8))
    broken = config(store, tmp_path / "broken", rows=64 * 8, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, on_step=interrupt_at(6))
    small_store(tmp_path, rows=1500)  # the store grows: more parts, and another mean
    fit(broken)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    fit(config(store, tmp_path / "later", rows=64 * 8))
    assert not equal(weights(tmp_path / "whole"), weights(tmp_path / "later"))


def test_a_run_whose_parts_are_gone_is_refused(tmp_path: Path) -> None:
    store = str(small_store(tmp_path, rows=1500)[0])
    fit(config(store, tmp_path / "run", rows=64))
    shutil.rmtree(Path(store) / "marks" / "4")
    with pytest.raises(ValueError, match="lacks parts that it had when the run") as error:
        fit(config(store, tmp_path / "run", rows=64))
    assert "order_digest" not in str(error.value)
    with pytest.raises(ValueError, match=r"lr: auto there, 0\.5 asked"):
        fit(config(store, tmp_path / "run", rows=64, lr=(0.5,)))


def test_a_coder_is_evaluated_on_its_own_store_only(store: str, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", rows=64, kind=("sae",), arch=("mp",)))
    (folder,) = (tmp_path / "run" / "coders").iterdir()
    other = small_store(tmp_path, seed=5)[0]
    with pytest.raises(ValueError, match="give that store or a copy of it"):
        evaluate_coder(folder, other, [])
    about = json.loads((folder / "coder.json").read_text())
    tensors = load_file(folder / "coder.safetensors")
    for name, wanted in [("rows", "rows must be at least 1, got 0"), ("k", "k must be at least 1")]:
        options = {"rows": 0, "other_k": []} if name == "rows" else {"other_k": [0]}
        with pytest.raises(ValueError, match=wanted):
            evaluate_coder(folder, Path(store), **options)
    about["input_widths"] = about["target_widths"] = [8]
    (folder / "coder.json").write_text(json.dumps(about))
    narrow = {n: t[:16, :8] if t.ndim == 2 else t[:8] for n, t in tensors.items()}
    checkpoint.save_file(
        {n: t.contiguous() for n, t in narrow.items()}, folder / "coder.safetensors"
    )
    with pytest.raises(ValueError, match=r"input has width 8, but layers\.1\.mlp:output of"):
        evaluate_coder(folder, Path(store), [])


def test_memory_is_in_bytes_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, totals = torch.device("cpu"), {}
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        totals[platform] = peak_memory_bytes(cpu)
    assert totals["linux"] > 512 * totals["darwin"]
