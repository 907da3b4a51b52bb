"""FVU over a tuned setting: each line has a point per value, and the best is circled."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpcache.errors import UsageError
from mpcli.mptrain import app
from mptrain.experiments.plot_tuning import plot_tuning, read_values
from mptrain.runs.fit import fit
from mptrain.tuning.tune import TunedSetting, tune
from tests.helpers.fits import config
from tests.helpers.stores import small_store

SMALL = {"kind": ("sae",), "rows": 64 * 8}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_store(tmp_path_factory.mktemp("plot"))[0])


@pytest.fixture(scope="module")
def tuned(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TunedSetting]]:
    run = tmp_path_factory.mktemp("tuned") / "run"
    return run, tune(config(store, run, **SMALL, lr=(0.1,)))


def test_every_tried_value_is_a_row_of_the_table(
    tuned: tuple[Path, list[TunedSetting]], tmp_path: Path
) -> None:
    files = plot_tuning([tuned[0]], "lr", tmp_path / "lr")
    assert [file.suffix for file in files] == [".png", ".svg", ".csv", ".json"]
    with files[2].open(newline="") as file:
        rows = [(row["arch"], float(row["lr"]), float(row["fvu"])) for row in csv.DictReader(file)]
    assert rows == [
        (search.coder.arch, trial.value, trial.report_fvu)
        for search in tuned[1]
        for trial in search.trials
    ]


def test_the_value_that_the_search_chose_is_marked(
    tuned: tuple[Path, list[TunedSetting]],
) -> None:
    best = [value.value for value in read_values(tuned[0], "lr") if value.is_best]
    assert best == [search.best.value for search in tuned[1]]


def test_a_list_given_by_hand_is_drawn_too(store: str, tmp_path: Path) -> None:
    """A coder that diverged is in the table and not in the figure."""
    run = tmp_path / "run"
    results = fit(config(store, run, **SMALL, arch=("topk",), lr=(0.01, 0.1, 1e30)))
    values = list(read_values(run, "lr"))
    assert [value.value for value in values] == [0.01, 0.1, 1e30]
    assert [value.coder.name for value in values] == [
        "layers.1.mlp-sae-topk-k3-x2-seed0-dead-rows200"
    ] * 3
    assert results[2].diverged
    evaluations = [result.validation for result in results if result.validation is not None]
    assert [value.fvu for value in values[:2]] == [evaluation.fvu for evaluation in evaluations]
    assert [value.is_best for value in values].count(True) == 1
    files = plot_tuning([run], "lr", tmp_path / "lr")
    assert json.loads(files[3].read_text())[2]["fvu"] == "inf"


def test_what_cannot_be_drawn_is_refused(store: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UsageError, match="holds no run"):
        plot_tuning([run], "lr", tmp_path / "lr")
    fit(config(store, run, **SMALL))
    with pytest.raises(UsageError, match=r"no coder of .* has two values of lr; give a run of"):
        plot_tuning([run], "lr", tmp_path / "lr")
    with pytest.raises(UsageError, match="over must be one of lr, auxk_alpha"):
        plot_tuning([run], "k", tmp_path / "lr")
    (run / "results.json").write_text("[]")
    with pytest.raises(UsageError, match="is not finished"):
        plot_tuning([run], "lr", tmp_path / "lr")


def test_the_commands_search_and_draw(store: str, tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "over")
    done = CliRunner().invoke(
        app,
        [
            *("fit", store, "--run", run, "--hookpoints", "layers.0", "--arch", "topk"),
            *("--k", "3", "--expansion", "2", "--rows", "512", "--batch-rows", "64"),
            *("--lr", "0.1", "--tune", "lr,auxk-alpha"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "lr of layers.0-sae-topk-k3-x2-seed0:" in done.stdout
    assert "auxk_alpha of layers.0-sae-topk-k3-x2-seed0:" in done.stdout
    assert done.stdout.count("  best\n") == 4, "two headings, two best values"
    best = done.stdout.strip().splitlines()[-1].removeprefix("best coder: ")
    assert (Path(best) / "coder.json").exists()
    drawn = CliRunner().invoke(app, ["plot", run, "--over", "auxk-alpha", "--out", out])
    assert drawn.exit_code == 0, drawn.output
    assert drawn.stdout.split() == [f"{out}.{ending}" for ending in ("png", "svg", "csv", "json")]
