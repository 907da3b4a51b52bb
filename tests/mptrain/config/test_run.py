"""Warnings about settings that are legal but probably unintended, and runs of listed coders."""

import dataclasses

import pytest

from mptrain.config.coder import CoderConfig
from mptrain.config.run import ListedConfig
from tests.mptrain.config.test_fit import config


def test_free_dictionaries_are_warned_of():
    (warning,) = config(preset=("mp", "free-norm"), arch=("mp",), dead_rows=9).warnings()
    assert warning.endswith("-dead-rows9: with free_norm a step can enlarge the residual")


def test_latents_that_never_count_as_dead_are_warned_of():
    sizes = {"arch": ("mp",), "rows": 1000, "batch_rows": 10}
    (warning,) = config(**sizes, dead_rows=1000).warnings()
    assert "count as dead after 1,000 rows, but the run trains on 1,000" in warning
    assert warning.endswith("use --dead-rows 495 or less, or train on more rows")
    assert config(**sizes, dead_rows=495).warnings() == []
    (warning,) = config(**{**sizes, "batch_rows": 1000}, dead_rows=1).warnings()
    assert "no --dead-rows is low enough for so short a run" in warning
    assert len(config(**sizes, dead_rows=991).warnings()) == 1  # too late for the last step
    assert config(**sizes, dead_rows=990).warnings() == []
    assert config(**sizes, dead_rows=1000, auxk_alpha=0.0).warnings() == []


def test_a_list_of_coders_need_be_no_grid() -> None:
    sae = CoderConfig(
        inputs=("a:output",), targets=("a:output",), kind="sae", arch="mp", k=4, expansion=2
    )
    transcoder = dataclasses.replace(sae, inputs=("b:input",), kind="transcoder", detach=True)
    run = {"store": "s", "run": "r"}
    assert ListedConfig(**run, listed=(sae, transcoder)).coders() == (sae, transcoder)
    with pytest.raises(ValueError, match="listed must have each value only once"):
        ListedConfig(**run, listed=(sae, sae))
    with pytest.raises(ValueError, match="rows must be at least batch_rows"):
        ListedConfig(**run, listed=(sae,), rows=10)
