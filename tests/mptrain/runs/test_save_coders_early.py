"""Coders of a stopped run are usable at once, and saving them does not change its final result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpcli.mptrain import app as mptrain
from mptrain.coders.checkpoint import load_coder
from mptrain.evals.evaluate import evaluate_coder
from mptrain.runs import saved_state
from mptrain.runs.fit import fit
from mptrain.runs.save_coders_early import save_coders
from tests.helpers.fits import config, equal, interrupt_at, lasting, weights
from tests.helpers.stores import small_store

GRID = {"kind": ("sae",), "arch": ("mp", "batch-topk"), "eval_every": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("fit"))[0])


def stopped(store: str, run: Path, **changes: Any) -> None:
    """A run of 24 train steps that stops in the 13th; its last saved state is of the 10th."""
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, run, **GRID, **changes), on_step=interrupt_at(13))


@pytest.mark.parametrize("optimizer", ["muon", "signsgd"])
def test_coders_of_a_stopped_run(store: str, tmp_path: Path, optimizer: str) -> None:
    """Saved coders are the validated ones; the run continues to the bits of an undisturbed run."""
    changes = {"optimizer": optimizer}
    fit(config(store, tmp_path / "whole", **GRID, **changes))
    stopped(store, tmp_path / "run", **changes)
    saved = save_coders(str(tmp_path / "run"), {})
    assert save_coders(str(tmp_path / "run"), {}) == saved
    records = {r.coder: r for r in lasting(tmp_path / "run") if r.step == 10}
    assert len(saved) == 2
    for coder in saved:
        folder = Path(coder.folder)
        assert folder.name == f"{coder.coder}-step10"
        _, trained = load_coder(folder)
        assert (trained["step"], trained["steps"], trained["finished"]) == (10, 24, False)
        assert trained["rows_read"] == 640
        assert 0 < trained["rows_trained"] < 640, "first positions are left out"
        evaluation = evaluate_coder(folder, store, ())[0]
        assert evaluation.fvu == pytest.approx(records[coder.coder].validation_fvu, rel=1e-5)
    fit(config(store, tmp_path / "run", **GRID, **changes))
    final = {name: t for name, t in weights(tmp_path / "run").items() if "-step10/" not in name}
    assert equal(final, weights(tmp_path / "whole"))
    assert save_coders(str(tmp_path / "run"), {}) == []
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert all(r["finished"] and r["step"] == r["steps"] == 24 for r in results)


def test_the_command(store: str, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "moved")
    stopped(store, tmp_path / "run")
    arguments = ["save-coders", str(tmp_path / "run"), str(tmp_path / "moved")]
    completed = CliRunner().invoke(mptrain, arguments)
    assert completed.exit_code == 0, completed.output
    assert completed.stdout.count("-step10: after 10 of 24 train steps") == 2
    shown = json.loads(CliRunner().invoke(mptrain, [*arguments, "--json"]).stdout)
    evaluated = CliRunner().invoke(mptrain, ["eval", shown[0]["folder"], store])
    assert evaluated.exit_code == 0, evaluated.output
    drawn = CliRunner().invoke(
        mptrain, ["plot", str(tmp_path / "run"), "--out", str(tmp_path / "f")]
    )
    assert drawn.exit_code == 0, drawn.output
    fit(config(store, tmp_path / "run", **GRID))
    again = CliRunner().invoke(mptrain, arguments)
    assert (again.exit_code, "are finished" in again.stdout) == (0, True)


def test_finished_passes_are_not_saved_again(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = config(store, tmp_path / "run", **GRID)
    names = [coder.name for coder in alone.coders()]
    bytes_per_coder = 12_000_000
    with monkeypatch.context() as patch:
        patch.setattr("mptrain.runs.plan.group_into_passes", lambda *_: [[name] for name in names])
        with pytest.raises(KeyboardInterrupt):
            fit(
                config(store, tmp_path / "run", **GRID, max_memory=bytes_per_coder),
                on_step=interrupt_at(24 + 8),
            )
    (saved,) = save_coders(str(tmp_path / "run"), {})
    assert saved.coder == names[1]
    assert {f.name for f in (tmp_path / "run/coders").iterdir()} == {names[0], f"{names[1]}-step5"}


def test_errors_of_save_coders(store: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        save_coders(str(tmp_path / "none"), {})
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "early", **GRID), on_step=interrupt_at(3))
    with pytest.raises(ValueError, match="has no saved state; wait"):
        save_coders(str(tmp_path / "early"), {})
    stopped(store, tmp_path / "run")
    other = small_store(tmp_path, seed=1)[0]
    with pytest.raises(ValueError, match="a different config"):
        save_coders(str(tmp_path / "run"), {"store": str(other)})


def test_a_state_that_a_later_one_replaces_is_no_damage(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(store, tmp_path / "run")
    states, load = tmp_path / "run/state", saved_state.load_file

    def replaced(file: Path) -> Any:
        monkeypatch.setattr(saved_state, "load_file", load)
        (states / "10").rename(states / "15")
        return load(file)

    monkeypatch.setattr(saved_state, "load_file", replaced)
    assert len(save_coders(str(tmp_path / "run"), {})) == 2
    (states / "15/state.safetensors").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        save_coders(str(tmp_path / "run"), {})


def test_a_coder_before_its_switch_codes_as_it_was_trained(store: str, tmp_path: Path) -> None:
    changes = {"arch": ("mp",), "begin_as": "topk", "begin_share": 0.75}
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run", **{**GRID, **changes}), on_step=interrupt_at(13))
    (saved,) = save_coders(str(tmp_path / "run"), {})
    (validation,) = (r.validation_fvu for r in lasting(tmp_path / "run") if r.step == 10)
    coder, _ = load_coder(Path(saved.folder))
    assert coder.encoder.coded_as == "topk"
    assert evaluate_coder(Path(saved.folder), store, ())[0].fvu == pytest.approx(validation)
