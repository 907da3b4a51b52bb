"""Both command lines: wrong input gets one clear line and exit code 2, and nothing is written."""

import errno
import json
import os
import shutil
import signal
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

from mpcache.collection import producer as producer_module
from mpcli.field_docs import field_docs
from mpcli.mpcache import app as mpcache
from mpcli.mptrain import app as mptrain
from mptrain.config.coder_grid import FitConfig
from mptrain.config.presets import PRESETS
from mptrain.runs import fit as fit_module
from tests.helpers.models import save_tiny, tiny_tokenizer
from tests.helpers.stores import small_config, small_store, write_corpus

COLLECT = ("--rows", "600", "--ctx-len", "16", "--part-rows", "192", "--chunk-rows", "32")
COLLECT += ("--validation-every", "4", "--model-dtype", "float32")
FIT = ("--k", "3", "--expansion", "2", "--rows", "800", "--batch-rows", "64")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a corpus and a store; tests add to it and change nothing."""
    folder = tmp_path_factory.mktemp("inputs")
    small_store(folder, rows=600)
    return folder


def collect(inputs: Path, *more: str, model: str = "model", data: str = "corpus.jsonl"):
    arguments = [str(inputs / model), str(inputs / data), *more]
    return CliRunner().invoke(mpcache, ["collect", *arguments, *COLLECT])


def error_line(result) -> str:
    """The one error line of a user's mistake."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def test_unknown_hookpoint_lists_near_names(inputs: Path) -> None:
    message = error_line(collect(inputs, str(inputs / "new"), "--hookpoints", "layer.1.mpl"))
    assert "layers.*.mlp" in message
    assert not (inputs / "new").exists()


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("no_model", "corpus.jsonl", "no_model"),
        ("model", "no.jsonl", "does not exist"),
        ("model", "empty.jsonl", "empty"),
        ("model", "one.jsonl", "each split must fill at least one sequence"),
    ],
)
def test_missing_or_useless_input(inputs: Path, model: str, data: str, message: str) -> None:
    (inputs / "empty.jsonl").write_text("")
    (inputs / "one.jsonl").write_text(json.dumps({"text": "only one document " * 9}) + "\n")
    result = collect(
        inputs, str(inputs / "new"), "--hookpoints", "layers.0", model=model, data=data
    )
    assert message in error_line(result)
    assert not (inputs / "new").exists()


def test_a_store_of_another_model_or_of_other_settings_is_refused(inputs: Path) -> None:
    before = {f: f.read_bytes() for f in (inputs / "store").rglob("*") if f.is_file()}
    save_tiny(inputs / "other_model", seed=1)
    store = str(inputs / "store")
    other = collect(inputs, store, "--hookpoints", "layers.0", model="other_model")
    assert "model_digest" in error_line(other)
    settings = collect(inputs, store, "--hookpoints", "layers.0", "--seed", "7")
    assert "seed: 0 in the store, 7 requested" in error_line(settings)
    dtype = collect(inputs, store, "--hookpoints", "layers.0", "--batch-sequences", "5",
                    "--dtype", "float16")  # fmt: skip
    assert "dtype: bfloat16 in the store, float16 requested" in error_line(dtype)
    assert {f: f.read_bytes() for f in (inputs / "store").rglob("*") if f.is_file()} == before


def test_unknown_format_version(inputs: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(inputs / "store", tmp_path / "store"))
    text = (store / "store.json").read_text()
    (store / "store.json").write_text(text.replace('"format_version": 1', '"format_version": 7'))
    for command in ("info", "verify", "stats"):
        assert "version 7" in error_line(CliRunner().invoke(mpcache, [command, str(store)]))
    fit = ["fit", str(store), "--run", str(tmp_path / "run"), "--hookpoints", "layers.0", *FIT]
    assert "version 7" in error_line(CliRunner().invoke(mptrain, fit))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(inputs: Path) -> None:
    below_a_file = str(inputs / "corpus.jsonl" / "store")
    assert "Not a directory" in error_line(
        collect(inputs, below_a_file, "--hookpoints", "layers.0")
    )


def test_a_folder_that_is_no_store_stays_as_it_is(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not a store" in error_line(
        collect(inputs, str(tmp_path), "--hookpoints", "layers.0")
    )
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
    assert "is not a store" in error_line(CliRunner().invoke(mpcache, ["info", str(tmp_path)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--part-rows", "100", "--ctx-len", "16"), "use 112"),
        (("--chunk-rows", "50"), "chunk_rows must divide part_rows"),
        (("--rows", "12q"), "must be a whole number such as 4096, 200k or 10M"),
        (("--dtype", "int4"), "must be one of bfloat16, float16, float32"),
        (("--validation-every", "1"), "at least 2"),
    ],
)
def test_invalid_options_are_refused(inputs: Path, options: tuple[str, ...], message: str) -> None:
    arguments = [str(inputs / "model"), str(inputs / "corpus.jsonl"), str(inputs / "new")]
    command = ["collect", *arguments, "--hookpoints", "layers.0", *COLLECT, *options]
    result = CliRunner().invoke(mpcache, command)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (inputs / "new").exists()


def test_nonfinite_activations_are_counted_reported_and_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.embed_tokens.weight[tiny_tokenizer().encode("a")[0]] = float("inf")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_corpus(tmp_path / "corpus.jsonl")
    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    collected = collect(tmp_path, store, "--hookpoints", "layers.0")
    assert collected.exit_code == 0
    assert "NaN or infinite" in collected.stderr
    report = json.loads(CliRunner().invoke(mpcache, ["stats", store, "--json"]).stdout)
    assert report[0]["nonfinite"] > 0
    fit = ["fit", store, "--run", run, "--hookpoints", "layers.0", *FIT]
    message = error_line(CliRunner().invoke(mptrain, fit))
    assert "NaN or infinite" in message
    assert "--allow-nonfinite" in message
    allowed = CliRunner().invoke(mptrain, [*fit, "--allow-nonfinite", "--json"])
    assert allowed.exit_code == 0, allowed.output
    assert all(r["validation"]["fvu"] < 1.5 for r in json.loads(allowed.stdout))


def test_every_command_of_the_readme_runs_in_order(inputs: Path, tmp_path: Path) -> None:
    """collect, info, verify, stats, fit, eval and plot, as in the README."""
    store, run = str(inputs / "store"), tmp_path / "run"
    small_config(inputs)
    assert CliRunner().invoke(mpcache, ["verify", store]).exit_code == 0
    assert "layers.1.mlp" in CliRunner().invoke(mpcache, ["info", store]).stdout
    fit = ["fit", store, "--run", str(run), "--hookpoints", "layers.0,layers.1.mlp", *FIT]
    fitted = CliRunner().invoke(mptrain, [*fit, "--json"])
    assert fitted.exit_code == 0, fitted.output
    results = json.loads(fitted.stdout)
    assert json.loads((run / "results.json").read_text()) == results
    assert len(results) == 4
    for result in results:
        coder = str(run / "coders" / result["coder"])
        evaluated = CliRunner().invoke(mptrain, ["eval", coder, store, "--k", "1", "--json"])
        own, other = json.loads(evaluated.stdout)["rows"]
        assert own == pytest.approx(result["validation"])  # batches are of another size
        assert (own["k"], other["k"]) == (3, 1)
        assert other["fvu"] > own["fvu"]
    plotted = CliRunner().invoke(mptrain, ["plot", str(run), "--out", str(tmp_path / "fvu")])
    assert plotted.exit_code == 0, plotted.output
    suffixes = {f.suffix for f in tmp_path.glob("fvu.*")}
    assert suffixes == {".png", ".svg", ".csv", ".json"}


def test_a_full_disk_is_one_line(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = collect(inputs, str(tmp_path / "new"), "--hookpoints", "layers.0")
    assert result.exit_code == 1
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "No space left on device" in message
    assert str(tmp_path / "new") in message


def test_ctrl_c_says_how_to_continue(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(producer_module, "capture_part", interrupted)
    result = collect(inputs, str(tmp_path / "new"), "--hookpoints", "layers.0")
    assert result.exit_code == 130
    assert "run the same command again to continue" in result.stderr
    monkeypatch.undo()
    assert collect(inputs, str(tmp_path / "new"), "--hookpoints", "layers.0").exit_code == 0


def test_bench_measures_both(inputs: Path) -> None:
    arguments = ["bench", str(inputs / "model"), str(inputs / "corpus.jsonl"), *COLLECT]
    options = ["--hookpoints", "layers.0,layers.1.mlp", "--repeats", "1", "--json"]
    report = json.loads(CliRunner().invoke(mpcache, [*arguments, *options]).stdout)
    assert (report["arrays"], report["bytes_per_row"], report["rows"]) == (3, 3 * 16 * 2, 768)
    assert report["ratio"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hookpoints", "layers.7"), "use one of: layers.0, layers.1.mlp"),
        (("--hookpoints", "layers.0", "--kind", "transcoder"), "has no input of layers.0"),
        (("--hookpoints", "layers.0", "--k", "33"), "k must be at most the number of latents"),
        (("--hookpoints", "layers.0", "--rows", "10"), "rows must be at least batch_rows"),
    ],
)
def test_invalid_fits_are_refused(
    inputs: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    fit = ["fit", str(inputs / "store"), "--run", str(tmp_path / "run"), *FIT, *options]
    assert message in error_line(CliRunner().invoke(mptrain, fit))
    assert not (tmp_path / "run").exists()


def test_fit_refuses_another_config_in_the_same_run(inputs: Path, tmp_path: Path) -> None:
    fit = [
        "fit",
        str(inputs / "store"),
        "--run",
        str(tmp_path / "run"),
        "--hookpoints",
        "layers.0",
    ]
    assert CliRunner().invoke(mptrain, [*fit, *FIT]).exit_code == 0
    message = error_line(CliRunner().invoke(mptrain, [*fit, *FIT, "--lr", "0.5"]))
    assert "lr: auto there, 0.5 asked" in message


def test_fit_stops_on_a_flipped_byte(inputs: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(inputs / "store", tmp_path / "store"))
    file = store / "arrays.zarr/acts/layers.0/output/c/0/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    fit = ["fit", str(store), "--run", str(tmp_path / "run"), "--hookpoints", "layers.0", *FIT]
    result = CliRunner().invoke(mptrain, fit)
    assert result.exit_code == 1
    assert "acts/layers.0/output/c/0/0 is damaged" in result.stderr
    assert not (tmp_path / "run" / "coders").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hookpoints", ","), "hookpoints is empty"),
        (("--hookpoints", "layers.0", "--k", ","), "k is empty"),
        (("--hookpoints", "layers.0,layers.0"), "must have each value only once"),
        (("--hookpoints", "layers.0", "--device", "foo"), "use --device auto or cpu"),
        (("--hookpoints", "layers.0", "--lr", "nan"), "lr must be positive"),
        (("--hookpoints", "layers.0", "--skip-positions", "16"), "skip_positions=16, ctx_len=16"),
    ],
)
def test_settings_that_cannot_be_fitted(
    inputs: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    fit = ["fit", str(inputs / "store"), "--run", str(tmp_path / "run"), *FIT, *options]
    if "--k" in options:
        fit = [*fit[:4], *FIT[2:], *options]
    assert message in error_line(CliRunner().invoke(mptrain, fit))
    assert not (tmp_path / "run").exists()


def test_no_hookpoints_to_collect(inputs: Path, tmp_path: Path) -> None:
    message = error_line(collect(inputs, str(tmp_path / "new"), "--hookpoints", ","))
    assert "hookpoints is empty" in message


def test_runs_and_figures_below_a_file(inputs: Path, tmp_path: Path) -> None:
    below = str(inputs / "corpus.jsonl" / "run")
    fit = ["fit", str(inputs / "store"), "--hookpoints", "layers.0", *FIT]
    assert "cannot write in" in error_line(CliRunner().invoke(mptrain, [*fit, "--run", below]))
    assert CliRunner().invoke(mptrain, [*fit, "--run", str(tmp_path / "run")]).exit_code == 0
    plot = ["plot", str(tmp_path / "run"), "--out", below]
    assert "cannot write in" in error_line(CliRunner().invoke(mptrain, plot))


def test_eval_takes_lists_and_refuses_nothing_to_do(inputs: Path, tmp_path: Path) -> None:
    store, run = str(inputs / "store"), str(tmp_path / "run")
    fit = ["fit", store, "--run", run, "--hookpoints", "layers.0", "--arch", "mp", *FIT]
    fitted = CliRunner().invoke(mptrain, [*fit, "--json"])
    name = json.loads(fitted.stdout)[0]["coder"]
    evaluate = ["eval", f"{run}/coders/{name}", store]
    report = CliRunner().invoke(mptrain, [*evaluate, "--k", "1,2", "--k", "4", "--json"])
    assert [row["k"] for row in json.loads(report.stdout)["rows"]] == [3, 1, 2, 4]
    report = CliRunner().invoke(mptrain, [*evaluate, "--codes", "gp,omp", "--json"])
    rows = json.loads(report.stdout)["rows"]
    assert [row["codes"] for row in rows] == ["mp", "gp", "omp"]
    assert rows[0]["fvu"] > rows[1]["fvu"] > rows[2]["fvu"]
    for options, message in [
        (("--rows", "0"), "rows must be at least 1, got 0"),
        (("--k", "0"), "k must be at least 1, got 0"),
        (("--device", "foo"), "use --device auto or cpu"),
    ]:
        assert message in error_line(CliRunner().invoke(mptrain, [*evaluate, *options]))


def test_coders_with_an_encoder_have_no_codes(inputs: Path, tmp_path: Path) -> None:
    store, run = str(inputs / "store"), str(tmp_path / "run")
    fit = ["fit", store, "--run", run, "--hookpoints", "layers.0", "--arch", "mp,topk", *FIT]
    assert CliRunner().invoke(mptrain, fit).exit_code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    codes = {result["coder"]: result["validation"]["codes"] for result in results}
    assert sorted(codes.values(), key=str) == [None, "mp"]
    name = next(name for name, value in codes.items() if value is None)
    shown = CliRunner().invoke(mptrain, ["eval", f"{run}/coders/{name}", store]).stdout
    assert [line.split()[1] for line in shown.splitlines()] == ["codes", "-"]


def test_presets_are_listed_as_options() -> None:
    message = CliRunner().invoke(mptrain, ["presets"]).stdout
    assert "paper             --select signed --no-bias" in message
    report = CliRunner().invoke(mptrain, ["presets", "--json"]).stdout
    assert json.loads(report) == {name: dict(changes) for name, changes in PRESETS.items()}


def test_ctrl_c_says_whether_a_fit_continues_or_starts_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    presses = 0

    def press(*_: object) -> None:
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fit_module, "fit", partial(fit_module.fit, on_step=press))
    fit = [
        "fit",
        str(inputs / "store"),
        "--run",
        str(tmp_path / "run"),
        "--hookpoints",
        "layers.0",
    ]
    for times, message in (
        (2, "run the same command again to start over"),
        (1, "to continue after train step 1"),
    ):
        presses = times
        result = CliRunner().invoke(mptrain, [*fit, *FIT])
        assert result.exit_code == 130
        assert message in result.stderr


def test_every_field_has_its_own_or_an_inherited_doc() -> None:
    docs = field_docs(FitConfig)
    assert list(docs)[:4] == ["hookpoints", "input", "target", "kind"]
    assert {"optimizer", "dead_rows"} <= docs.keys() == {f.name for f in fields(FitConfig)}
