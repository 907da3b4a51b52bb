"""What `mptrain bench` reports: sizes so small that times say nothing, everything else does."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mpcli.mptrain import app
from mptrain.bench import pursuit as bench_module
from mptrain.bench.measure import Method, saved_bytes
from mptrain.bench.peers import ADAPTERS
from mptrain.bench.pursuit import bench, make_tensors, same_atoms
from mptrain.coders.coder import Coder
from mptrain.config.run import BenchConfig
from mptrain.runs.fit import fit
from tests.helpers import reference
from tests.helpers.fits import config as fit_config
from tests.helpers.stores import small_store

PURSUITS = ["direct", "gram", "gram bfloat16", "shortlist", "shortlist bfloat16"]
METHODS = [*PURSUITS, "topk", "groupmax", "bare products"]
SMALL = BenchConfig(rows=40, width=16, latents=64, k=4, peers=(), repeats=1, device="cpu")


def test_measures_every_method_on_planted_rows():
    found = {one.method: one for one in bench(SMALL).methods}
    assert list(found) == METHODS
    direct = found["direct"]
    assert (direct.encode_ratio, direct.train_ratio) == (1, 1)
    assert (direct.same_atoms, direct.fvu_change) == (1, 0)
    for one in found.values():
        assert one.encode_seconds > 0
    for name in PURSUITS:
        # indices, values and the last residual; the loss keeps its error
        assert found[name].saved_bytes == 40 * (12 * 4 + 2 * 4 * 16)
        assert found[name].same_atoms == pytest.approx(1, abs=0.02)
    assert found["bare products"].train_seconds is None


def fake_peer(coder: Coder) -> Method:
    """A tool that answers with dense codes, and keeps `[rows, latents]` of them."""
    W_MD, b_D = coder.decoder_ME.detach().clone().requires_grad_(), coder.b_D.detach()

    def encode(x_BD: torch.Tensor) -> torch.Tensor:
        code = coder.encode(x_BD)
        return reference.dense(code.idx_BK, code.val_BK, coder.latents)

    return Method(
        name="fake",
        encode=encode,
        loss=lambda x_BD: (x_BD - b_D - encode(x_BD) @ W_MD).square().mean(),
        parameters=(W_MD,),
        pursues=True,
    )


@pytest.mark.parametrize(("peer_rows", "measured"), [(10, [40, 10]), (40, [40]), (99, [40])])
def test_peers_are_measured_beside_ours_on_the_same_rows(
    peer_rows: int, measured: list[int], monkeypatch: pytest.MonkeyPatch
):
    config = dataclasses.replace(SMALL, peer_rows=peer_rows)
    _, coder = make_tensors(config)
    peers = [fake_peer(coder)]
    monkeypatch.setattr(bench_module, "find_peers", lambda *_: (peers, {"other": "no module"}))
    report = bench(config)
    assert report.absent == {"other": "no module"}
    assert list(dict.fromkeys(one.rows for one in report.methods)) == measured
    beside = {one.method: one for one in report.methods if one.rows == measured[-1]}
    assert set(beside) >= {*PURSUITS, "topk", "groupmax", "fake"}
    fake, direct = beside["fake"], beside["direct"]
    assert (direct.encode_ratio, direct.same_atoms, direct.fvu_change) == (1, 1, 0)
    assert (fake.same_atoms, fake.fvu_change) == (1, pytest.approx(0, abs=1e-5))
    assert fake.saved_bytes is not None
    assert direct.saved_bytes is not None
    assert fake.saved_bytes > measured[-1] * 64 * 4 > direct.saved_bytes / 2


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
        options = ["--coder", str(coder), "--store", str(store), "--rows", "50", "--k", "3"]
        result = CliRunner().invoke(app, ["bench", *options, "--repeats", "1", "--json"])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert {one["method"] for one in report["methods"]} >= {*PURSUITS, "topk"}
        assert {*report["absent"]} <= {*ADAPTERS}
        assert "cores" in report["hardware"]
        assert f"torch {torch.__version__}" in report["hardware"]


def test_table_names_the_machine_and_what_was_not_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_module, "find_peers", lambda *_: ([], {"other": "no module"}))
    options = ["--rows", "9", "--width", "8", "--latents", "16", "--k", "3", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", *options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    header, columns, *rows, absent = result.stdout.splitlines()
    assert f"threads used: {torch.get_num_threads()}, torch {torch.__version__}" in header
    assert columns.split()[:2] == ["method", "rows"]
    assert len(rows) == len(METHODS) - 1, "16 latents do not make 3 groups"
    assert absent.startswith("not measured: other (no module); pip install 'mpcache[peers]'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10, "latents": 64}, "width must divide latents, .* use 60 latents"),
        ({"coder": "c"}, "coder and store go together"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"peer_rows": 0}, "peer_rows must be at least 1"),
    ],
)
def test_refuses(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**changes)  # type: ignore[arg-type]
