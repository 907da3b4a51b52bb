"""The report of `mptrain bench`, apart from times, which mean nothing at such small sizes."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mpcli.mptrain import app
from mptrain.bench.config import PursuitBenchConfig
from mptrain.bench.measure import saved_bytes
from mptrain.bench.pursuit import bench_pursuit, same_atoms
from mptrain.runs.fit import fit
from tests.helpers import reference
from tests.helpers.fits import config as fit_config
from tests.helpers.stores import small_store

PURSUITS = ["direct", "gram", "gram bfloat16", "shortlist", "shortlist bfloat16"]
METHODS = [*PURSUITS, "topk", "groupmax", "bare products"]
SMALL = PursuitBenchConfig(rows=40, width=16, latents=64, k=4, repeats=1, device="cpu")


def test_measures_every_method_on_planted_rows():
    measured = {row.method: row for row in bench_pursuit(SMALL).methods}
    assert list(measured) == METHODS
    direct = measured["direct"]
    assert (direct.encode_ratio, direct.train_ratio) == (1, 1)
    assert (direct.same_atoms, direct.fvu_change) == (1, 0)
    for row in measured.values():
        assert row.encode_seconds > 0
    for name in PURSUITS:
        # indices, values and the last residual; the loss keeps its error
        assert measured[name].saved_bytes == 40 * (12 * 4 + 2 * 4 * 16)
        assert measured[name].same_atoms == pytest.approx(1, abs=0.02)
    assert measured["bare products"].train_seconds is None


def test_same_atoms_counts_them_in_any_order():
    def pairs(*idx: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        idx_BK = torch.tensor(idx)
        return idx_BK, (idx_BK >= 0).float()

    codes = pairs([3, 1, 1, -1], [0, 2, 4, 5])
    assert same_atoms(codes, (codes[0].flip(1), codes[1].flip(1)), 6) == 1
    others = pairs([1, 3, 3, 3], [0, 2, 4, 1])
    assert same_atoms(codes, others, 6) == pytest.approx(5 / 7)
    assert same_atoms(codes, reference.dense(*others, 6), 6) == pytest.approx(5 / 6)


def test_saved_bytes_leaves_out_what_is_given():
    a, b, c = torch.ones(100, requires_grad=True), torch.ones(100), torch.ones(100)
    assert saved_bytes(lambda: (a * b * c).sum(), ()) == 800
    assert saved_bytes(lambda: (a * b * c).sum(), (a, c)) == 400


def test_command_on_a_trained_coder(tmp_path: Path):
    store, _ = small_store(tmp_path)
    fit(fit_config(str(store), tmp_path / "run", arch=("mp",)))
    for coder in (tmp_path / "run/coders").iterdir():
        options = [str(coder), str(store), "--rows", "50", "--k", "3"]
        result = CliRunner().invoke(app, ["bench", *options, "--repeats", "1", "--json"])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert {row["method"] for row in report["methods"]} >= {*PURSUITS, "topk"}
        assert "cores" in report["hardware"]
        assert f"torch {torch.__version__}" in report["hardware"]


def test_the_table_names_the_machine():
    options = ["--rows", "9", "--width", "8", "--latents", "16", "--k", "3", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", *options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    header, columns, *rows = result.stdout.splitlines()
    assert f"threads used: {torch.get_num_threads()}, torch {torch.__version__}" in header
    assert columns.split()[:2] == ["method", "rows"]
    assert len(rows) == len(METHODS) - 1, "16 latents do not make 3 groups"


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
        PursuitBenchConfig(**changes)  # type: ignore[arg-type]
