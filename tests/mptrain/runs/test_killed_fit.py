"""A run that is killed ten times, often inside a save, ends with the bits of an undisturbed run."""

import json
import multiprocessing
import random
import signal
import typing
from pathlib import Path
from typing import Any

import pytest

from mptrain.config.coder_settings import Optimizer
from mptrain.runs.fit import fit
from tests.helpers.fits import config, equal, lasting, state, weights
from tests.helpers.killers import fit_until_killed
from tests.helpers.stores import small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("killed"))[0])


def results_of(run: Path) -> list[dict[str, Any]]:
    results = json.loads((run / "results.json").read_text())
    return [{n: r[n] for n in ("coder", "diverged", "validation")} for r in results]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", typing.get_args(Optimizer))
def test_killed_ten_times_equals_never_killed(store: str, tmp_path: Path, optimizer: Any) -> None:
    settings: dict[str, Any] = {
        "kind": ("sae",), "rows": 64 * 30, "save_every": 3, "eval_rows": 64, "optimizer": optimizer
    }  # fmt: skip
    fit(config(store, tmp_path / "whole", **settings))
    context, draw = multiprocessing.get_context("forkserver"), random.Random(f"{optimizer} 1")
    context.set_forkserver_preload(["mptrain.runs.fit", "tests.helpers.killers"])
    log, killed = tmp_path / "log", config(store, tmp_path / "killed", **settings)
    # late moments come first: a nearly finished run would end before them
    moments = [("train", draw.randrange(8, 24)) for _ in range(3)]
    moments += [("save", draw.randrange(1, 30)) for _ in range(4)]
    moments += [("train", draw.randrange(1, 6)), ("save", draw.randrange(1, 4))]
    moments += [("save", draw.randrange(1, 4)), ("", 0)]
    for kind, moment in moments:
        process = context.Process(target=fit_until_killed, args=(killed, kind, moment, log))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if moment else 0), log.read_text()
    assert len(log.read_text().splitlines()) == 10
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert equal(state(tmp_path / "whole"), state(tmp_path / "killed"))
    assert lasting(tmp_path / "whole") == lasting(tmp_path / "killed")
    assert results_of(tmp_path / "whole") == results_of(tmp_path / "killed")
    left = [f.name for f in (tmp_path / "killed").rglob("*.partial")]
    assert not left, "a save clears what one that was killed has left"
