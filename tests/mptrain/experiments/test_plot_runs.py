"""The figure shows every validation of every coder, and its table has the same values."""

import csv
import doctest
import json
import math
import xml.etree.ElementTree as ET
from dataclasses import asdict

import pytest

from mptrain.config.coder import CoderConfig
from mptrain.config.coder_grid import FitConfig
from mptrain.config.sides import hookpoint_sides
from mptrain.experiments import plot_runs as plot_module
from mptrain.experiments.plot_runs import (
    caption,
    line_styles,
    plot_runs,
    read_curves,
    runs_figure,
)
from mptrain.runs.fit import fit
from mptrain.runs.metrics_file import MetricsFile, Record
from mptrain.training.learning_rate import rule_of
from tests.helpers.fits import spoil
from tests.helpers.stores import small_store

RED, BLUE = "#c8202f", "#1f5fa8"


def coder(**changes) -> CoderConfig:
    plain = {"hookpoint": "layers.2", "kind": "sae", "arch": "mp", "k": 4, "expansion": 2}
    settings = plain | changes
    sides = hookpoint_sides(settings.pop("hookpoint"), settings["kind"])
    return CoderConfig(**sides, **settings)


PAIR = (coder(), coder(arch="topk"))


def make_run(folder, coders, fvus=(0.9, None, 0.5, 0.4), seconds=1.0):
    """A run with a record per entry of `fvus`, None where there was no validation."""
    folder.mkdir()
    manifest = {
        "fit": {},
        "source": "m on d",
        "coders": [{"name": config.name, **asdict(config)} for config in coders],
        "store_fingerprint": "0",
        "order_digest": "0",
    }
    (folder / "config.json").write_text(json.dumps(manifest))
    file = MetricsFile(folder / "metrics.jsonl")
    file.path.touch()
    for step, fvu in enumerate(fvus):
        for config in coders:
            file.add(record(config.name, step, fvu, seconds))
    return folder


def record(name, step, fvu, seconds=1.0):
    return Record(
        coder=name,
        step=step,
        rows=8 * step,
        train_seconds=seconds * step,
        wait_seconds=0.0,
        fvu=0.7,
        validation_fvu=fvu,
        l0=4.0,
        dead_share=0.0,
        lr=1e-3,
        rows_per_second=8.0,
        peak_memory_bytes=1,
    )


def drawn(folder, coders, **options):
    """The axes of a run's figure."""
    return runs_figure(read_curves(make_run(folder / "run", coders, **options)), None).axes


def test_four_files_with_the_same_content_each_time(tmp_path):
    run = make_run(tmp_path / "run", PAIR)
    # a dot in the name is no ending
    paths = plot_runs([run], tmp_path / "figures" / "layers.2", title="model, data")
    assert [path.name for path in paths] == [f"layers.2.{e}" for e in ("png", "svg", "csv", "json")]
    first = [path.read_bytes() for path in paths]
    assert plot_runs([run], tmp_path / "figures" / "layers.2.png", title="model, data") == paths
    assert [path.read_bytes() for path in paths] == first
    assert first[0].startswith(b"\x89PNG")
    assert ET.fromstring(first[1]).tag.endswith("svg")


def test_the_example_runs(tmp_path, monkeypatch):
    make_run(tmp_path / "run", PAIR)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(plot_module)
    assert (result.failed, result.attempted) == (0, 2)


def test_the_table_holds_each_validation_with_its_settings(tmp_path):
    run = make_run(tmp_path / "run", PAIR)
    *_, csv_path, json_path = plot_runs([run], tmp_path / "figure")
    rows = json.loads(json_path.read_text())
    assert [row["validation_fvu"] for row in rows] == [0.9, 0.5, 0.4] * 2
    assert [row["train_seconds"] for row in rows] == [0.0, 2.0, 3.0] * 2
    assert [row["arch"] for row in rows] == ["mp"] * 3 + ["topk"] * 3
    with csv_path.open() as file:
        spelled = [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for row in rows
        ]
        assert list(csv.DictReader(file)) == spelled


def test_the_end_of_each_curve_is_in_the_table_and_in_the_caption(tmp_path):
    power = [None, *(step**-0.5 for step in range(1, 21))]
    runs = [
        make_run(tmp_path / "mp", PAIR[:1], fvus=[fvu and 0.9 * fvu for fvu in power], seconds=2.0),
        make_run(tmp_path / "topk", PAIR[1:], fvus=power),
    ]
    *_, json_path = plot_runs(runs, tmp_path / "figure")
    rows = json.loads(json_path.read_text())
    assert {row["still_falling"] for row in rows} == {True}
    gains = {coder.arch: 1 - 2 ** (-0.5 * (1 + rule_of(coder).steps)) for coder in PAIR}
    assert [row["gain_of_doubling"] for row in rows] == pytest.approx(
        [gains[row["arch"]] for row in rows]
    )
    low, high = (f"{100 * gain:.2g}" for gain in sorted(gains.values()))
    text = caption([[curve for run in runs for curve in read_curves(run)]])
    assert text.startswith(
        f"Still falling: 2 of 2 coders; twice the rows would lower FVU by about {low} to {high} %"
    )
    # by time, MP is below TopK's last FVU from .9 * n ** -.5 < 20 ** -.5 on: step 17 of 20
    assert text.endswith(
        "MP stays below TopK: at equal rows from the start; at equal train time from 85 % of its "
        "train time on."
    )


def test_a_lead_is_not_guessed(tmp_path):
    """Two TopK coders of one seed: either could be the one to compare MP with."""
    run = make_run(tmp_path / "run", [*PAIR, coder(arch="topk", expansion=4)])
    assert "MP stays below" not in caption([read_curves(run)])


def test_lines_are_the_validations_over_train_time(tmp_path):
    (ax,) = drawn(tmp_path, PAIR, seconds=600.0)
    mp, topk = ax.lines
    assert (
        mp.get_xydata().tolist() == topk.get_xydata().tolist() == [[0, 0.9], [20, 0.5], [30, 0.4]]
    )
    assert (mp.get_color(), topk.get_color()) == (RED, BLUE)
    assert ax.get_xlabel() == "train time of the coder (min)"
    assert ax.get_ylabel() == "FVU on validation rows"


def test_a_panel_for_each_hookpoint_kind_and_k_in_the_order_of_layers(tmp_path):
    coders = [
        coder(hookpoint=hookpoint, kind=kind, arch=arch, k=k)
        for hookpoint in ("layers.10.mlp", "layers.10", "layers.9", "layers.9.mlp")
        for kind in ("transcoder", "sae")
        for k in (128, 16)
        for arch in ("mp", "topk")
    ]
    axes = drawn(tmp_path, coders)
    titles = [ax.get_title() for ax in axes]
    hookpoints = ["layers.9", "layers.10", "layers.9.mlp", "layers.10.mlp"]
    assert titles == [
        f"{hookpoint}\n{kind}, k = {k}"
        for kind in ("SAE", "transcoder")
        for k in (16, 128)
        for hookpoint in hookpoints
    ]
    assert all(len(ax.lines) == 2 for ax in axes)
    assert [bool(ax.get_xlabel()) for ax in axes] == [False] * 13 + [True] * 3


@pytest.mark.parametrize(("fvus", "scale"), [((0.9, 0.3), "linear"), ((0.9, 0.1), "log")])
def test_the_axis_is_logarithmic_where_the_range_asks_for_it(tmp_path, fvus, scale):
    (ax,) = drawn(tmp_path, PAIR, fvus=fvus)
    assert ax.get_yscale() == scale


def test_seeds_are_thin_lines_of_one_look(tmp_path):
    (ax,) = drawn(tmp_path, [coder(seed=seed) for seed in range(3)])
    assert {(line.get_color(), line.get_linestyle()) for line in ax.lines} == {(RED, "-")}
    (tmp_path / "one").mkdir()
    (single,) = drawn(tmp_path / "one", [coder()])
    assert ax.lines[0].get_linewidth() < single.lines[0].get_linewidth()


def test_the_legend_names_what_else_differs(tmp_path):
    coders = [coder(arch=arch, expansion=x) for arch in ("mp", "topk") for x in (2, 4)]
    styles = line_styles(coders)
    assert {style.label for style in styles.values()} == {
        f"{arch}, expansion {x}"
        for arch in ("matching pursuit (MP)", "plain (TopK)")
        for x in (2, 4)
    }
    assert len({(style.color, style.dash) for style in styles.values()}) == 4


def test_several_runs_share_a_figure(tmp_path):
    runs = [make_run(tmp_path / name, [config]) for name, config in zip("ab", PAIR, strict=True)]
    *_, json_path = plot_runs(runs, tmp_path / "figure")
    assert {row["run"] for row in json.loads(json_path.read_text())} == {str(run) for run in runs}


def test_a_diverged_coder_is_drawn_until_then_and_named_in_the_table(tmp_path):
    run = make_run(tmp_path / "run", [coder()], fvus=(0.9, 0.5, math.nan))
    (ax,) = runs_figure(read_curves(run), None).axes
    assert len(ax.lines[0].get_xydata()) == 2
    *_, json_path = plot_runs([run], tmp_path / "figure")
    assert json.loads(json_path.read_text())[-1]["validation_fvu"] == "nan"


def test_a_coder_that_never_was_finite_leaves_its_panel_empty(tmp_path):
    runs = [
        make_run(tmp_path / "a", [coder(k=8)], fvus=(math.inf, math.nan)),
        make_run(tmp_path / "b", [coder()], fvus=(1.0, 0.1)),
        make_run(tmp_path / "c", [coder(k=2)], fvus=(0.31, 0.34)),
    ]
    plot_runs(runs, tmp_path / "figure")
    figure = runs_figure([curve for run in runs for curve in read_curves(run)], None)
    assert [len(ax.lines[0].get_xydata()) for ax in figure.axes] == [2, 2, 0]
    assert len(figure.axes[0].get_yticks()) > 2  # a narrow range is labelled too


def test_a_coder_without_validation_is_named(tmp_path):
    run = make_run(tmp_path / "run", PAIR, fvus=(None, None))
    with pytest.raises(
        ValueError, match=r"layers\.2-sae-mp\S* of \S+ has no validation to draw yet"
    ):
        plot_runs([run], tmp_path / "figure")


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: .*config\.json"):
        plot_runs([tmp_path], tmp_path / "figure")
    with pytest.raises(ValueError, match="no runs to plot"):
        plot_runs([], tmp_path / "figure")


def test_what_fit_writes_of_a_diverged_coder_is_drawn_and_named(tmp_path):
    def spoil_mp(step, coder_runs):
        if step == 6:
            spoil(next(run for run in coder_runs if run.config.arch == "mp"))

    path, _ = small_store(tmp_path)
    for eval_every in (2, 9):  # 9: it has no validation before
        run = tmp_path / str(eval_every)
        settings = {"hookpoints": ("layers.0",), "k": (3,), "expansion": (2,), "rows": 576}
        settings |= {"batch_rows": 64, "eval_every": eval_every, "device": "cpu"}
        results = fit(FitConfig(store=str(path), run=str(run), **settings), on_step=spoil_mp)
        assert [result.diverged for result in results] == [True, False]
        mp, topk = read_curves(run)
        assert (mp.diverged, topk.diverged) == (True, False)
        assert mp.records[-1].step == 6
        assert all(math.isfinite(r.validation_fvu) for r in mp.records[:-1])
        assert len(mp.finite_points()) == (2 if eval_every == 2 else 0)
        *_, table = plot_runs([run], tmp_path / "figure")
        diverged = [
            row["arch"] for row in json.loads(table.read_text()) if row["validation_fvu"] == "nan"
        ]
        assert diverged == ["mp"]


def test_a_figure_below_a_file_is_refused(tmp_path):
    run = make_run(tmp_path / "run", PAIR)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "fvu", tmp_path / "file" / "deeper" / "fvu"):
        with pytest.raises(ValueError, match="cannot write in"):
            plot_runs([run], out)
