"""What `mptrain bench` reports: sizes so small that times say nothing, everything else does."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli.mptrain import app
from mptrain.bench import bench, same_atoms
from mptrain.config import BenchConfig
from mptrain.fit import fit
from stores import small_store
from test_fit import config as fit_config

METHODS = ["direct", "gram", "shortlist", "shortlist bfloat16", "bare products", "topk"]
SMALL = BenchConfig(rows=40, width=16, latents=64, k=4, repeats=1, device="cpu")


def test_measures_every_method_on_planted_rows():
    found = {one.method: one for one in bench(SMALL)}
    assert list(found) == METHODS
    direct = found["direct"]
    assert (direct.encode_ratio, direct.train_ratio) == (1, 1)
    assert (direct.same_atoms, direct.fvu_change) == (1, 0)
    for one in found.values():
        assert one.encode_seconds > 0
    for name in METHODS[:4]:
        # indices, values and the last residual; the loss keeps its error
        assert found[name].saved_bytes == 40 * (12 * 4 + 2 * 4 * 16)
        assert found[name].same_atoms == pytest.approx(1, abs=0.02)
    assert found["bare products"].train_seconds is None


def test_same_atoms_counts_them_in_any_order():
    idx_BK = torch.tensor([[3, 1, 1, -1], [0, 2, 4, 5]])
    assert same_atoms(idx_BK, idx_BK.flip(1), 6) == 1
    assert same_atoms(idx_BK, torch.tensor([[1, 3, 3, 3], [0, 2, 4, 1]]), 6) == pytest.approx(5 / 7)


def test_command_on_a_trained_coder(tmp_path: Path):
    store, _ = small_store(tmp_path)
    fit(fit_config(str(store), tmp_path / "run", arch=("mp",)))
    for coder in (tmp_path / "run/coders").iterdir():
        options = ["--coder", str(coder), "--store", str(store), "--rows", "50", "--k", "3"]
        result = CliRunner().invoke(app, ["bench", *options, "--repeats", "1", "--json"])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert [one["method"] for one in report["methods"]] == METHODS
        assert "cores" in report["hardware"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10, "latents": 64}, "width must divide latents, .* use 60 latents"),
        ({"coder": "c"}, "coder and store go together"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_refuses(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**changes)  # type: ignore[arg-type]
