"""A small experiment file on a tiny model, for tests of any stage of a sweep."""

from collections.abc import Sequence
from pathlib import Path

from mpcache.collection.collect import collect
from mptrain.experiments.spec import Experiment, experiment_of
from mptrain.experiments.toml_config import read_settings
from tests.helpers.stores import small_config

TEXT = """title = "tiny"
run = "{folder}/run"
store = "{folder}/store"

[fit]
rows = 384
batch_rows = 64
eval_every = 2
eval_rows = 256
save_every = 2
log_every = 1
window_rows = 128
device = "cpu"

[coders]
dead_rows = 200
expansion = 2
lr = 0.01

[variants.batch-mp-nested]
label = "batch MP, nested prefixes"
color = "#7d0a14"
arch = "batch-mp"
nested = true

[figures.fvu]
title = "Tiny model"
hookpoints = ["layers.0", "layers.1.mlp"]
k = [3]
variants = ["mp", "topk", "batch-mp-nested"]
seeds = [0, 1]
other_k = [2, 5]

[figures.sst]
kind = "skip-transcoder"
hookpoints = ["layers.1.mlp"]
k = [3]
variants = ["mp", "detach"]
"""


def write_experiment(folder: Path, text: str = TEXT) -> Path:
    file = folder / "tiny.toml"
    file.write_text(text.replace("{folder}", str(folder)))
    return file


def tiny_experiment(folder: Path, *changes: str) -> Experiment:
    return experiment_of(read_settings(write_experiment(folder), changes))


class Collecting:
    """What a sweep is handed to collect with; counts how often it is asked."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.folder, self.asked, self.changes = folder, list[tuple[str, ...]](), changes

    def __call__(self, sides: Sequence[str]) -> str:
        self.asked.append(tuple(sides))
        store = self.folder / "store"
        collect(small_config(self.folder, hookpoints=tuple(sides), **self.changes), store)
        return str(store)
