"""Results and warnings of a run: each coder's own rows, and problems that users must know."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mpcache.store.acts_reader import ActsReader
from mpcli.mptrain import app as mptrain
from mptrain.runs.fit import fit
from mptrain.training.setup import CoderRun
from tests.helpers.fits import config, interrupt_at, lasting, spoil
from tests.helpers.stores import small_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("fit"))[0])


def test_each_coder_counts_its_own_rows(store: str, tmp_path: Path) -> None:
    """Also where a coder diverged, and a resumed run trained the other coders further."""
    interrupt = interrupt_at(13)

    def on_step(step: int, coder_runs: Sequence[CoderRun]) -> None:
        interrupt(step, coder_runs)
        if step == 3:
            spoil(coder_runs[0])

    sae = {"kind": ("sae",)}
    with pytest.raises(KeyboardInterrupt):
        fit(config(store, tmp_path / "run", **sae), on_step=on_step)
    ill, well = fit(config(store, tmp_path / "run", **sae))
    assert (ill.diverged, ill.step, ill.rows_read) == (True, 3, 3 * 64)
    assert (well.diverged, well.step, well.rows_read) == (False, 24, 24 * 64)
    for result in (ill, well):
        assert 0.9 * result.rows_read < result.rows_trained < result.rows_read
        assert result.rows_per_second == result.rows_trained / result.train_seconds
        last = [r for r in lasting(tmp_path / "run") if r.coder == result.coder][-1]
        assert (last.rows, last.rows_trained) == (result.rows_read, result.rows_trained)
    assert "stopped in train step 3, after" in ill.warnings[0]
    assert not well.warnings


def test_a_coder_without_rows_is_warned_of(store: str, tmp_path: Path) -> None:
    everything = tuple(map(str, range(258)))
    (result,) = fit(config(store, tmp_path / "run", kind=("sae",), arch=("mp",), rows=64 * 3,
                        skip_tokens=everything))  # fmt: skip
    assert (result.rows_read, result.rows_trained, result.rows_per_second) == (192, 0, 0.0)
    assert result.validation is None
    assert [w.partition(";")[0].split(" of ")[0] for w in result.warnings] == [
        "no train row passes the filters",
        "no validation row passes the filters",
    ]
    assert all(r.validation_fvu is None for r in lasting(tmp_path / "run")), "it did not diverge"


def test_a_side_without_variance_is_named_before_a_run_begins(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = ActsReader.moments

    def constant(self: ActsReader, hookpoint: str, side: str, split: Any = None) -> Any:
        mean, variance = moments(self, hookpoint, side, split)
        return mean, variance * (hookpoint != "layers.1.mlp" or side != "input")

    monkeypatch.setattr(ActsReader, "moments", constant)
    arguments = ["fit", store, "--run", str(tmp_path / "run"), "--hookpoints", "layers.1.mlp",
             "--kind", "skip-transcoder", "--rows", "640", "--batch-rows", "64"]  # fmt: skip
    completed = CliRunner().invoke(mptrain, arguments)
    assert completed.exit_code == 2
    assert "error: layers.1.mlp:input has no variance" in completed.stderr
    assert not (tmp_path / "run").exists()


def test_damage_names_the_commands_that_repair_it(store: str, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    damaged = str(tmp_path / "store")
    fit(config(damaged, tmp_path / "run", kind=("sae",), arch=("mp",)))
    for chunk in (tmp_path / "store/arrays.zarr/acts").rglob("c/*/0"):
        chunk.unlink()
    (coder,) = (tmp_path / "run/coders").iterdir()
    again = ["fit", damaged, "--run", str(tmp_path / "other"), "--hookpoints", "layers.1.mlp",
             "--rows", "640", "--batch-rows", "64"]  # fmt: skip
    for arguments in (again, ["eval", str(coder), damaged]):
        completed = CliRunner().invoke(mptrain, arguments)
        assert completed.exit_code == 1
        last = completed.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        assert "is missing" in last
        assert last.endswith(
            f"`mpcache verify {damaged}` lists all damage, "
            f"`mpcache repair {damaged}` restores the data"
        )
