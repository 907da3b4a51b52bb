"""An experiment file gives the coders that its figures need, or an error names the fault."""

import dataclasses
import json

import pytest

from mpcache.errors import UsageError
from mpcli.field_docs import field_groups
from mptrain.config.coder_grid import FitConfig
from mptrain.experiments.experiment_file import read_experiment
from mptrain.experiments.option_tables import (
    CODER_OPTIONS,
    OPTION_TABLES,
    RUN_OPTIONS,
    SET_ELSEWHERE,
    TABLE_OF_OPTION,
)
from tests.helpers.experiments import TEXT, tiny_experiment, write_experiment


def test_a_panel_for_each_k_and_hookpoint_and_a_coder_for_each_variant_and_seed(tmp_path):
    experiment = tiny_experiment(tmp_path, "figures.fvu.k=[3, 4]")
    assert [panel.name for panel in experiment.panels] == [
        "fvu/layers.0-sae-k3",
        "fvu/layers.1.mlp-sae-k3",
        "fvu/layers.0-sae-k4",
        "fvu/layers.1.mlp-sae-k4",
        "sst/layers.1.mlp-skip-transcoder-k3",
    ]
    mp, topk, nested = experiment.panels[2].lines
    assert [coder.name for coder in mp.coders] == [
        "layers.0-sae-mp-k4-x2-seed0-lr0.01-dead-rows200",
        "layers.0-sae-mp-k4-x2-seed1-lr0.01-dead-rows200",
    ]
    assert [(c.arch, c.nested) for c in (topk.coders[0], nested.coders[0])] == [
        ("topk", False),
        ("batch-mp", True),
    ]
    assert experiment.panels[-1].lines[1].coders[0].detach
    assert len(experiment.coders) == 4 * 3 * 2 + 2


def test_red_and_blue_differ_in_their_architecture_alone(tmp_path):
    experiment = tiny_experiment(tmp_path, "optimizer.optimizer=adam", "loss.auxk_alpha=0.1")
    mp, topk, _ = experiment.panels[0].lines
    for coder, other in zip(mp.coders, topk.coders, strict=True):
        assert coder.name.replace("-mp-", "-topk-") == other.name
    assert mp.variant.is_plain
    assert topk.variant.is_plain


def test_sides_are_those_that_the_coders_read(tmp_path):
    experiment = tiny_experiment(tmp_path)
    wanted = ("layers.0:output", "layers.1.mlp:output", "layers.1.mlp:input")
    assert experiment.sides == wanted
    assert experiment.only(["fvu"]).sides == wanted[:2]


def test_a_coder_in_two_figures_is_one(tmp_path):
    both = tiny_experiment(tmp_path, "figures.sst.kind=sae")
    assert len(both.coders) == 2 * 3 * 2 + 1


def test_parts_are_named_by_figure_or_panel(tmp_path):
    experiment = tiny_experiment(tmp_path)
    assert experiment.only([]) is experiment
    names = [panel.name for panel in experiment.only(["*/layers.1.mlp-*"]).panels]
    assert names == ["fvu/layers.1.mlp-sae-k3", "sst/layers.1.mlp-skip-transcoder-k3"]
    assert [figure.name for figure in experiment.only(["sst"]).figures] == ["sst"]
    with pytest.raises(
        ValueError, match=r"no figure or panel matches 'fvu/x'; use one of: fvu, ss"
    ):
        experiment.only(["sst", "fvu/x"])


def test_the_resolved_file_is_the_same_experiment(tmp_path):
    experiment = tiny_experiment(tmp_path, "data.rows=640")
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps(experiment.resolved({"model": "m"})))
    again = read_experiment(file)
    assert again == dataclasses.replace(experiment, collect={"model": "m"})
    assert again.run_settings["skip_positions"] == 1  # a default, written out
    assert json.loads(file.read_text())["collect"] == {"model": "m"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "root=stores",
            r"the file is invalid: give either store or root \(a folder of stores\), got store=",
        ),
        ("run=x", "run is a table of options; write folder above the tables"),
        ("run.run=x", "run.run is not set here, but by folder above the tables"),
        ("data.store=x", "data.store is not set here, but by store above the tables"),
        ("parallel.spread=rows", "parallel.spread is unknown"),
        ("data.batch_rows=1000", "data.rows must be at least batch_rows"),
        ("data.max_norm=0.5", "data.max_norm must be at least 1 and finite, got 0.5"),
        ("evaluation.eval_every=0", "evaluation.eval_every must be at least 1, got 0"),
        ("run.log=['wandb', 'wandb']", "run.log must have each value only once"),
        ("coder.k=3", r"coder.k is not set here, but by k in \[figures.NAME\]"),
        ("coder.arch=mp", r"but by arch in \[variants.NAME\]"),
        ("coder.preset=mp", "but by its name in variants of a figure"),
        ("coder.seed=3", r"but by seeds in \[figures.NAME\]"),
        ("coder.rows=3", r"but by rows in \[data\]"),
        ("coder.dead_rows=3", r"but by dead_rows in \[loss\]"),
        ("coder.x=3", "coder.x is unknown; .*known: "),
        ("optimizer.learning_rate=3.0", "optimizer.learning_rate is unknown"),
        ("data.lr=3.0", r"but by lr in \[optimizer\]"),
        ("data.input=x", r"but by hookpoints in \[figures.NAME\]"),
        ("fit.rows=3", r"fit.rows is not set here, but by rows in \[data\]"),
        ("fit.save_every=3", r"but by save_every in \[run\]"),
        ("coders.expansion=3", r"coders.expansion is not set here, but by expansion in \[coder\]"),
        ("figures.fvu.lr=3.0", r"but by lr in \[optimizer\]"),
        ("variants.batch-mp-nested.k=3", r"but by k in \[figures.NAME\]"),
        (
            "coder.shortlist_size=8",
            "fvu.variants has mp, but shortlist_size applies only to backend=short",
        ),
        ("figures.fvu.variants=['detatch']", r"variants.detatch is unknown; did you mean detach\?"),
        (
            "figures.fvu.variants=['separate']",
            "has separate, but subtract=separate applies only to transco",
        ),
        ("figures.fvu.variants=[]", "figures.fvu is invalid: variants is empty"),
        ("figures.fvu.seeds=[1, 1]", "seeds must have each value only once"),
        ("figures.fvu.k=[0]", "k must be at least 1, got 0"),
        (
            "figures.fvu.variants=['mp', 'sliced']",
            "figures.fvu.other_k has 5, which sliced cannot use: k mu",
        ),
        (
            "variants.batch-mp-nested.latents=4",
            "other_k has 5, which batch-mp-nested cannot use: k",
        ),
        ("variants.detach.detach=true", "variants.detach is the name of a built-in variant"),
        ("variants.new.label=x", "variants.new changes nothing; set arch"),
        ("variants.batch-mp-nested.color=red", "must be a color such as #7d0a14, got 'red'"),
        ("figures.a/b.k=[3]", "figures.a/b must be usable as a folder name"),
        ("figure.x.k=[3]", r"figure is unknown; did you mean figures\?"),
        ("coder.expansion=0", "expansion must be at least 1, got 0"),
    ],
)
def test_errors_name_the_key_and_the_line(tmp_path, change, message):
    with pytest.raises(UsageError, match=message) as error:
        tiny_experiment(tmp_path, change)
    assert "tiny.toml" in str(error.value) or change in str(error.value)


def test_a_setting_that_applies_to_no_coder_is_refused(tmp_path):
    change = "loss.input_loss=0.5"
    assert tiny_experiment(tmp_path, change)  # applies to the transcoders
    message = "loss.input_loss does nothing: input_loss has no effect"
    with pytest.raises(UsageError, match=message):
        tiny_experiment(tmp_path, change, "figures.sst.kind=sae")


def test_an_old_table_is_named_with_file_and_line(tmp_path):
    file = write_experiment(tmp_path, TEXT + "\n[fit]\nbatch_rows = 3\n")
    line = len(file.read_text().splitlines())
    message = (
        rf"tiny.toml, line {line}: fit.batch_rows is not set here, but by batch_rows in \[data\]"
    )
    with pytest.raises(UsageError, match=message):
        read_experiment(file)


def test_the_tables_are_the_groups_of_the_options():
    groups = {group.lower() for group in field_groups(FitConfig).values()}
    assert set(OPTION_TABLES) == groups
    assert {**RUN_OPTIONS, **CODER_OPTIONS}.keys() <= TABLE_OF_OPTION.keys()
    for name, group in field_groups(FitConfig).items():
        assert TABLE_OF_OPTION[name] == group.lower()
        is_set = name in RUN_OPTIONS or name in CODER_OPTIONS
        assert is_set == (name not in SET_ELSEWHERE and name != "spread")


def test_variants_that_are_the_same_coder(tmp_path):
    with pytest.raises(
        ValueError, match="has mp and twin, which are the same coder; remove one of them"
    ):
        tiny_experiment(tmp_path, "variants.twin.arch=mp", "figures.fvu.variants=['mp', 'twin']")
    with pytest.raises(ValueError, match="has mp and detach, which are the same coder"):
        tiny_experiment(tmp_path, "coder.detach=true")


def test_a_variant_may_have_another_size(tmp_path):
    changes = ("variants.wide.latents=99", "figures.fvu.variants=['mp', 'wide']")
    mp, wide = tiny_experiment(tmp_path, *changes).panels[0].lines
    assert (mp.coders[0].expansion, wide.coders[0].expansion) == (2, None)
    assert wide.coders[0].latents_of(16) == 99


def test_a_file_without_figures(tmp_path):
    file = write_experiment(tmp_path, TEXT[: TEXT.index("[figures")])
    with pytest.raises(ValueError, match=r"figures is missing; add a table \[figures.NAME\]"):
        read_experiment(file)
