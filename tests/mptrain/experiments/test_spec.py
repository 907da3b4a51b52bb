"""An experiment file gives the coders that its figures need, or says what is wrong with it."""

import json

import pytest

from mptrain.experiments.spec import experiment_of
from mptrain.experiments.toml_config import read_settings
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
    experiment = tiny_experiment(tmp_path, "coders.optimizer=adam", "coders.auxk_alpha=0.1")
    mp, topk, _ = experiment.panels[0].lines
    for one, other in zip(mp.coders, topk.coders, strict=True):
        assert one.name.replace("-mp-", "-topk-") == other.name
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
    with pytest.raises(ValueError, match=r"no figure or panel is called fvu/x; there are: fvu, ss"):
        experiment.only(["sst", "fvu/x"])


def test_the_resolved_file_is_the_same_experiment(tmp_path):
    experiment = tiny_experiment(tmp_path, "fit.rows=640")
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps(experiment.resolved({"model": "m"})))
    again = experiment_of(read_settings(file))
    assert again == experiment
    assert again.fit["skip_positions"] == 1  # a default, written out
    assert json.loads(file.read_text())["collect"] == {"model": "m"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("root=stores", "it cannot be so: give store or root, got store="),
        ("fit.run=x", "fit.run is unknown"),
        ("fit.spread=rows", "fit.spread is unknown"),
        ("fit.batch_rows=1000", "fit cannot be so: rows must be at least batch_rows"),
        ("coders.k=3", r"coders.k is not set here, but by k in \[figures.NAME\]"),
        ("coders.arch=mp", r"but by arch in \[variants.NAME\]"),
        ("coders.seed=3", r"but by seeds in \[figures.NAME\]"),
        ("coders.rows=3", r"but by rows in \[fit\]"),
        ("coders.store=x", "coders.store is unknown"),
        ("fit.arch=mp", r"but by arch in \[variants.NAME\]"),
        ("fit.lr=3.0", r"but by lr in \[coders\]"),
        ("fit.inputs=x", r"but by hookpoints in \[figures.NAME\]"),
        ("figures.fvu.lr=3.0", r"but by lr in \[coders\]"),
        ("variants.batch-mp-nested.k=3", r"but by k in \[figures.NAME\]"),
        ("coders.input_loss=0.5", ""),
        ("coders.shortlist_size=8", "fvu.variants has mp, but shortlist_size is for backend short"),
        ("figures.fvu.variants=['detatch']", r"variants.detatch is unknown; did you mean detach\?"),
        ("figures.fvu.variants=['separate']", "has separate, but subtract separate is for transco"),
        ("figures.fvu.variants=[]", "figures.fvu cannot be so: variants is empty"),
        ("figures.fvu.seeds=[1, 1]", "seeds must name each value once"),
        ("figures.fvu.k=[0]", "k and other_k must be at least 1, got 0"),
        (
            "figures.fvu.variants=['mp', 'sliced']",
            "figures.fvu.other_k has 5, which is not for sliced: k mu",
        ),
        (
            "variants.batch-mp-nested.latents=4",
            "other_k has 5, which is not for batch-mp-nested: k",
        ),
        ("variants.detach.detach=true", "variants.detach is there without a table"),
        ("variants.new.label=x", "variants.new sets nothing that it differs by"),
        ("variants.batch-mp-nested.color=red", "takes a color such as #7d0a14, got 'red'"),
        ("figures.a/b.k=[3]", "figures.a/b becomes a folder's name"),
        ("figure.x.k=[3]", r"figure is unknown; did you mean figures\?"),
        ("coders.expansion=0", "expansion must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, told):
    if not told:
        assert tiny_experiment(tmp_path, change)  # of use to the transcoders
        told, change = "does nothing: input_loss has no effect", "coders.input_loss=0.5"
        with pytest.raises(ValueError, match=told):
            tiny_experiment(tmp_path, change, "figures.sst.kind=sae")
        return
    with pytest.raises(ValueError, match=told) as found:
        tiny_experiment(tmp_path, change)
    assert "tiny.toml" in str(found.value) or change in str(found.value)


def test_variants_that_are_the_same_coder(tmp_path):
    with pytest.raises(ValueError, match="has mp and twin, the same coder; leave one out"):
        tiny_experiment(tmp_path, "variants.twin.arch=mp", "figures.fvu.variants=['mp', 'twin']")
    with pytest.raises(ValueError, match="has mp and detach, the same coder"):
        tiny_experiment(tmp_path, "coders.detach=true")


def test_a_variant_may_have_another_size(tmp_path):
    changes = ("variants.wide.latents=99", "figures.fvu.variants=['mp', 'wide']")
    mp, wide = tiny_experiment(tmp_path, *changes).panels[0].lines
    assert (mp.coders[0].expansion, wide.coders[0].expansion) == (2, None)
    assert wide.coders[0].latents_of(16) == 99


def test_a_file_without_figures(tmp_path):
    file = write_experiment(tmp_path, TEXT[: TEXT.index("[figures")])
    with pytest.raises(ValueError, match=r"figures is missing; add a table \[figures.NAME\]"):
        experiment_of(read_settings(file))
