"""Laws of a sweep: no work is repeated, an interruption changes no bit, problems are named."""

import csv
import dataclasses
import json
import multiprocessing
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mpcache.errors import UsageError
from mpcli.mptrain import app
from mpcli.sweep_collection import collect_settings, read_experiment
from mptrain.experiments import figure_folder, other_k
from mptrain.experiments.captions import caption
from mptrain.experiments.estimate import estimate_sweep
from mptrain.experiments.runs import check_same_settings, find_runs, plan_runs, read_trained
from mptrain.experiments.sweep import sweep
from mptrain.runs.fit import fit
from tests.helpers.experiments import TEXT, CountedCollection, tiny_experiment, write_experiment
from tests.helpers.fits import equal, interrupt_at, lasting, weights
from tests.helpers.killers import sweep_until_killed
from tests.helpers.stores import small_config, write_corpus
from tests.helpers.trained import all_trained

COLLECTED = {"model": "tiny", "dataset": "random letters"}
SMALL = ("figures.fvu.hookpoints=['layers.0']", "figures.fvu.seeds=[0]")
WIDTHS = {("layers.0", "output"): 16, ("layers.1.mlp", "input"): 16, ("layers.1.mlp", "output"): 16}


def run(folder: Path, *changes: str, only=(), collecting=None):
    collecting = collecting or CountedCollection(folder)
    experiment = tiny_experiment(folder, *changes)
    return sweep(
        experiment, only=only, collect=collecting, collect_settings=COLLECTED, hardware="two cores"
    )


@pytest.fixture
def undrawn(monkeypatch):
    """Skip drawing, which takes longer than the training, for tests of other things."""
    monkeypatch.setattr(figure_folder, "save_sweep_figure", lambda *_: [])


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory):
    """A finished sweep: its folder and its result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_every_figure_with_its_tables(finished_sweep):
    folder, result = finished_sweep
    names = {str(f.relative_to(folder / "run" / "figures")) for f in result.files}
    ends = ("png", "svg")
    pictures = {
        f"{f}/{axis}.{e}" for f in ("fvu", "sst") for axis in ("time", "rows") for e in ends
    }
    tables = {f"{f}/{t}.{e}" for f in ("fvu", "sst") for t in ("points", "verdicts") for e in
              ("csv", "json")}  # fmt: skip
    other = {f"fvu/other-k.{end}" for end in ("png", "svg", "csv", "json")}
    assert names == pictures | tables | other | {"fvu/figure.md", "sst/figure.md"}
    assert all(file.stat().st_size for file in result.files)
    assert result.problems == ()
    assert len(result.verdicts) == 2 * 3 + 2


def test_tables_hold_each_point(finished_sweep):
    folder, _ = finished_sweep
    figure_folder = folder / "run" / "figures" / "fvu"
    points = json.loads((figure_folder / "points.json").read_text())
    assert len(points) == 2 * 3 * 2 * 3  # panels, variants, seeds; every second of six steps
    assert {(p["variant"], p["seed"]) for p in points} == {
        (variant, seed) for variant in ("mp", "topk", "batch-mp-nested") for seed in (0, 1)
    }
    with (figure_folder / "points.csv").open() as file:
        assert [float(row["validation_fvu"]) for row in csv.DictReader(file)] == [
            p["validation_fvu"] for p in points
        ]
    other = json.loads((figure_folder / "other-k.json").read_text())
    assert sorted({row["evaluated_k"] for row in other}) == [2, 3, 5]
    assert len(other) == 2 * 3 * 2 * 3


def test_the_caption_says_what_is_shown(finished_sweep):
    folder, _ = finished_sweep
    page = (folder / "run" / "figures" / "fvu" / "figure.md").read_text()
    for phrase in (
        "tiny on random letters; trained on 384 rows in batches of 64",
        "32 latents, adam, lr 0.01",
        "2 seeds: line their mean, band from lowest to highest",
        "FVU on 256 held-out rows",
        "Train time is that of the coder's own train steps; waiting for data took",
        "Hardware: two cores",
        "MP stays below TopK: at equal rows",
        "| layers.0-sae-k3 | batch-mp-nested |",
    ):
        assert phrase in page


def test_a_caption_counts_the_held_out_rows_that_there_are(finished_sweep):
    experiment = tiny_experiment(finished_sweep[0], "evaluation.eval_rows=100_000")
    coders = read_trained(find_runs(Path(experiment.header.folder)))
    (figure, *_) = experiment.figures
    experiment = dataclasses.replace(experiment, collect=COLLECTED)
    text = caption(experiment, figure, coders, ["two cores"], "rows")
    rows = next(iter(coders.values())).validation["rows"]
    assert 256 < rows < 1000
    assert f"FVU on {rows} held-out rows" in text


def test_a_caption_says_which_finished_coders_were_still_falling(tmp_path):
    experiment = tiny_experiment(tmp_path)
    experiment = dataclasses.replace(experiment, collect=COLLECTED)
    (figure, *_), coders = experiment.figures, all_trained(experiment)
    first = next(iter(coders))
    coders[first] = dataclasses.replace(coders[first], result=None)
    text = caption(experiment, figure, coders, ["two cores"], "rows")
    assert "Still falling: 11 of 11 coders; twice the rows would lower FVU by about" in text
    assert "MP stays below TopK: at equal rows" in text


def test_nothing_is_done_twice(finished_sweep):
    folder, before = finished_sweep
    bits, collecting = weights(folder / "run" / "runs" / "1"), CountedCollection(folder)
    result = run(folder, collecting=collecting)
    assert result == before
    assert collecting.calls == []
    assert equal(weights(folder / "run" / "runs" / "1"), bits)
    assert [started.folder.name for started in find_runs(folder / "run")] == ["1"]


def test_the_resolved_file_is_beside_the_results(finished_sweep):
    folder, _ = finished_sweep
    saved = json.loads((folder / "run" / "experiment.json").read_text())
    assert saved["data"]["skip_positions"] == 1
    assert saved["collect"] == COLLECTED


@pytest.mark.usefixtures("undrawn")
def test_parts_then_the_whole_equal_the_whole_at_once(finished_sweep, tmp_path):
    folder, _ = finished_sweep
    collecting = CountedCollection(tmp_path)
    run(tmp_path, only=["fvu/layers.0-*"], collecting=collecting)
    assert collecting.calls == [("layers.0:output",)]
    result = run(tmp_path, collecting=collecting)
    assert len(result.verdicts) == 2 * 3 + 2
    runs = find_runs(tmp_path / "run")
    assert [len(started.coders) for started in runs] == [6, 6 + 2]
    both = weights(runs[0].folder) | weights(runs[1].folder)
    assert equal(both, weights(folder / "run" / "runs" / "1"))


@pytest.mark.usefixtures("undrawn")
def test_interrupted_equals_uninterrupted(finished_sweep, tmp_path):
    folder, _ = finished_sweep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mptrain.experiments.sweep.fit", partial(fit, on_step=interrupt_at(4)))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    (begun,) = find_runs(tmp_path / "run")
    assert not begun.is_finished
    assert run(tmp_path, "run.max_memory=1_000_000_000").problems == ()  # this setting may change
    (done,) = find_runs(tmp_path / "run")
    assert equal(weights(done.folder), weights(folder / "run" / "runs" / "1"))
    assert lasting(done.folder) == lasting(folder / "run" / "runs" / "1")


@pytest.mark.usefixtures("undrawn")
def test_a_variant_added_later_is_trained_alone(tmp_path):
    run(tmp_path, *SMALL, only=["fvu"])
    added = "figures.fvu.variants=['mp', 'topk', 'batch-mp-nested', 'detach']"
    result = run(tmp_path, *SMALL, added, only=["fvu"])
    runs = find_runs(tmp_path / "run")
    assert [[c.detach for c in started.coders] for started in runs] == [[False] * 3, [True]]
    assert [verdict.variant for verdict in result.verdicts][-1] == "detach"


@pytest.mark.usefixtures("undrawn")
def test_coders_of_other_rows_are_refused(tmp_path):
    run(tmp_path, *SMALL, only=["fvu"])
    with pytest.raises(
        ValueError, match=r"with different settings \(data.rows: 384 there, 448 here"
    ):
        run(tmp_path, *SMALL, "data.rows=448")
    run(tmp_path, *SMALL, "run.save_every=1", only=["fvu"])  # the interval of saves may change


@pytest.mark.usefixtures("undrawn")
def test_what_changes_no_row_and_no_step_may_change(finished_sweep, tmp_path):
    folder, _ = finished_sweep
    free = ("run.max_memory=1_000_000_000", "parallel.read_threads=1")
    free += ("data.cache_dir='/dev/shm/cache'", "data.cache_bytes=1_000_000")
    experiment = tiny_experiment(tmp_path, *free)
    stored = tiny_experiment(folder).resolved({**COLLECTED, "write_threads": None})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "experiment.json").write_text(json.dumps(stored))
    check_same_settings(tmp_path / "run", experiment.resolved({"write_threads": 3}))
    for name, value in (("run.log_every", 7), ("evaluation.eval_every", 5)):
        other = tiny_experiment(tmp_path, f"{name}={value}").resolved(COLLECTED)
        with pytest.raises(ValueError, match=rf"coders with different settings \({name}: "):
            check_same_settings(tmp_path / "run", other)


def test_a_folder_of_another_version_is_refused_in_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    old = json.dumps({"collect": {}, "fit": {"rows": 384}, "coders": {}})
    (tmp_path / "run" / "experiment.json").write_text(old)
    with pytest.raises(UsageError, match=r"another version of mptrain: it has no table \["):
        run(tmp_path)


def test_a_sweep_from_a_file_on_an_existing_store(tmp_path):
    CountedCollection(tmp_path)(["layers.0:output"])
    text = TEXT.replace('"layers.0", "layers.1.mlp"', '"layers.0"').replace("[0, 1]", "[0]")
    file = write_experiment(tmp_path, text.replace("[2, 5]", "[]"))
    result = sweep(file, only=["fvu"])
    assert [verdict.variant for verdict in result.verdicts] == ["mp", "topk", "batch-mp-nested"]
    page = (tmp_path / "run" / "figures" / "fvu" / "figure.md").read_text()
    assert "unknown model on unknown dataset; trained on 384 rows" in page


def test_a_dry_run_refuses_what_the_sweep_would(tmp_path):
    file, folder = on_disk(tmp_path), tmp_path / "run"
    experiment, config = read_experiment(file, ())
    folder.mkdir()
    text = json.dumps(experiment.resolved(collect_settings(config)))
    (folder / "experiment.json").write_text(text)
    result = command(file, "--dry-run", "--set", "data.rows=448")
    assert (result.exit_code, "data.rows: 384 there, 448 here" in result.stderr) == (2, True)
    assert [f.read_text() for f in folder.iterdir()] == [text]


@pytest.mark.usefixtures("undrawn")
def test_a_store_that_grew_gives_later_runs_the_rows_of_the_first(tmp_path):
    run(tmp_path, *SMALL, only=["fvu"])
    grown = CountedCollection(tmp_path, rows=2400)
    run(tmp_path, collecting=grown)
    first, second = find_runs(tmp_path / "run")
    assert len(grown.calls) == 1
    assert first.parts == second.parts == set(range(8))
    assert first.order_digest == second.order_digest
    for part in ("marks/7", "marks/8"):  # lose the coders of the first run
        shutil.rmtree(tmp_path / "store" / part)
    wider = "figures.fvu.seeds=[0, 1, 2]"
    with pytest.raises(ValueError, match=r"lacks parts 7, on which the coders in .* were trained"):
        run(tmp_path, wider, collecting=lambda _: str(tmp_path / "store"))
    assert len(find_runs(tmp_path / "run")) == 2


@pytest.mark.usefixtures("undrawn")
def test_runs_of_different_rows_are_refused_before_anything_is_done(finished_sweep, tmp_path):
    folder, _ = finished_sweep
    for name in ("1", "2", "1-copy"):  # the last folder is not of the sweep
        shutil.copytree(folder / "run" / "runs" / "1", tmp_path / "run" / "runs" / name)
    assert [started.folder.name for started in find_runs(tmp_path / "run")] == ["1", "2"]
    file = tmp_path / "run" / "runs" / "2" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "order_digest": "other"}))
    collecting = CountedCollection(tmp_path)
    with pytest.raises(ValueError, match="trained on different rows"):
        run(tmp_path, "figures.fvu.seeds=[0, 1, 2]", collecting=collecting)
    assert collecting.calls == []


def test_other_k_is_checked_before_training(tmp_path):
    changes = ("figures.fvu.k=[4]", "figures.fvu.variants=['topk', 'groupmax']")
    message = (
        r"figures.fvu.other_k has 5, which groupmax cannot use: k must divide the number of lat"
    )
    with pytest.raises(ValueError, match=message):
        estimate_sweep(tiny_experiment(tmp_path, *changes), (), WIDTHS)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *changes, only=["fvu"])
    assert find_runs(tmp_path / "run") == ()


def test_an_fvu_that_is_not_finite_is_kept_and_not_drawn(finished_sweep, tmp_path, monkeypatch):
    folder, _ = finished_sweep
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "other-k")
    stores = []

    def evaluated(_, store, *__, **___):
        stores.append(store)
        fvus = {3: 0.5, 2: float("inf"), 5: float("nan")}
        return [SimpleNamespace(k=k, fvu=fvu) for k, fvu in fvus.items()]

    monkeypatch.setattr(other_k, "evaluate_coder", evaluated)
    changes = (*SMALL, "store=s3://bucket/store")
    for _ in range(2):
        run(tmp_path, *changes, only=["fvu"], collecting=lambda _: "s3://bucket/store")
    assert stores == 3 * ["s3://bucket/store"]  # unchanged, and once for each coder
    kept = (tmp_path / "run" / "figures" / "fvu" / "other-k.json").read_text()
    assert [row["fvu"] for row in json.loads(kept)] == 3 * ["inf", 0.5, "nan"]


def test_torchruns_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    collecting = CountedCollection(tmp_path)
    with pytest.raises(
        ValueError, match="mptrain sweep runs in one process, got several by torchrun"
    ):
        run(tmp_path, collecting=collecting)
    assert collecting.calls == []


@pytest.mark.usefixtures("undrawn")
def test_killed_equals_never_killed(finished_sweep, tmp_path):
    folder, _ = finished_sweep
    store, log = str(folder / "store"), tmp_path / "log"
    context = multiprocessing.get_context("forkserver")
    # each step of a coder and each line is a moment: killed in the fourth step, after two saves
    arguments = (write_experiment(tmp_path), COLLECTED, store, "train", 3 * 28 + 2, log)
    process = context.Process(target=sweep_until_killed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (begun,) = find_runs(tmp_path / "run")
    assert not begun.is_finished
    experiment = tiny_experiment(tmp_path)
    result = sweep(
        experiment, collect=lambda _: store, collect_settings=COLLECTED, hardware="two cores"
    )
    assert result.problems == ()
    assert equal(weights(begun.folder), weights(folder / "run" / "runs" / "1"))
    assert lasting(begun.folder) == lasting(folder / "run" / "runs" / "1")


def test_a_variant_that_does_nothing_and_a_missing_curve_are_problems(tmp_path):
    changes = (
        "variants.idle.tolerance=1e-30",
        "variants.wild.lr=1e30",
        "figures.fvu.variants=['mp', 'topk', 'idle', 'wild']",
    )
    result = run(tmp_path, *SMALL, *changes, only=["fvu"])
    idle, wild = sorted(result.problems, reverse=True)
    assert "fvu/layers.0-sae-k3: idle gives exactly the same results as plain MP" in idle
    assert "has no curve of wild, seed 0" in wild
    assert any(file.name == "time.png" for file in result.files)


def test_a_plan_continues_what_has_begun(tmp_path):
    experiment = tiny_experiment(tmp_path)
    (new,) = plan_runs(tmp_path, experiment.coders, ())
    assert (new.folder.name, new.coders) == ("1", experiment.coders)
    first, second = experiment.coders[:3], experiment.coders[2:5]
    begun = type(new)(tmp_path / "runs" / "1", first)
    done = type(new)(tmp_path / "runs" / "2", second, is_finished=True)
    go_on, more = plan_runs(tmp_path, experiment.coders, (begun, done))
    assert go_on is begun
    assert more.folder.name == "3"
    assert more.coders == experiment.coders[5:]
    assert plan_runs(tmp_path, second, (begun, done)) == ()


def test_the_estimate_knows_what_is_left(finished_sweep, tmp_path):
    folder, _ = finished_sweep
    before = estimate_sweep(tiny_experiment(tmp_path), (), WIDTHS)
    assert (before.coders, before.coders_left, before.passes) == (14, 14, 1)
    assert before.train_seconds is None
    assert before.memory_bytes > before.coders_bytes > 14 * 32 * 16 * 4
    after = estimate_sweep(tiny_experiment(folder), (), WIDTHS)
    assert (after.coders_left, after.passes, after.train_seconds) == (0, 0, 0.0)
    most = f"run.max_memory={before.memory_bytes - 1}"
    less = estimate_sweep(tiny_experiment(tmp_path, most), (), WIDTHS)
    assert less.passes == 2
    assert less.memory_bytes < before.memory_bytes
    wider = "figures.fvu.seeds=[0, 1, 2]"
    more = estimate_sweep(tiny_experiment(folder, wider), (), WIDTHS)
    assert more.coders_left == 6
    assert more.train_seconds > 0  # by the other seeds' rows/s


def command(file: Path, *arguments: str):
    return CliRunner().invoke(app, ["sweep", str(file), *arguments])


def on_disk(folder: Path) -> Path:
    """An experiment file with the tiny model that it collects from."""
    config = small_config(folder)
    collect = f'''
[collect]
model = "{config.model}"
dataset = "{write_corpus(folder / "corpus.jsonl")}"
rows = 1500
ctx_len = 16
part_rows = 192
chunk_rows = 32
model_dtype = "float32"
validation_every = 4
device = "cpu"
'''
    return write_experiment(folder, TEXT + collect)


def test_the_command_collects_trains_and_draws(tmp_path):
    file = on_disk(tmp_path)
    plan = command(file, "--dry-run", "--json")
    assert plan.exit_code == 0, plan.output
    printed = json.loads(plan.stdout)
    assert printed["rows_collected"] == 8 * 192
    assert (printed["sides"], printed["store_bytes"]) == (3, 8 * 192 * 3 * 16 * 2)
    assert (printed["train_rows"], printed["epochs"]) == (6 * 192, 384 / (6 * 192))
    assert (printed["coders_left"], printed["train_seconds"]) == (14, None)
    assert not (tmp_path / "run").exists()
    assert "time      unknown" in command(file, "--dry-run").stdout
    done = command(file, "--only", "sst", "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout[done.stdout.index("{") :])
    assert [verdict["variant"] for verdict in printed["verdicts"]] == ["mp", "detach"]
    experiment, _ = read_experiment(file, ())
    assert len(find_runs(Path(experiment.header.folder))[0].coders) == 2
    idle = command(file, "--only", "sst", "--set", "variants.idle.tolerance=1e-30", "--set",
                   "figures.sst.variants=['mp', 'idle']")  # fmt: skip
    assert idle.exit_code == 2
    assert (
        "error: sst/layers.1.mlp-skip-transcoder-k3: idle gives exactly the same results as "
        "plain MP" in idle.stderr
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("collect.hookpoints=['layers.0']",), "but by hookpoints in [figures.NAME]"),
        (("collect.ctx_len=17",), "part_rows must be a multiple of ctx_len"),
        (("collect.model=3",), "collect.model must be text in quotes, got 3"),
        (("data.rows=1M",), "data.rows must be a whole number such as 10_000_000, got '1M'"),
    ],
)
def test_mistakes_of_the_user_take_one_line(tmp_path, changes, message):
    result = command(on_disk(tmp_path), *(part for c in changes for part in ("--set", c)))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    missing = command(tmp_path / "none.toml")
    assert (missing.exit_code, "none.toml cannot be read" in missing.stderr) == (2, True)
