"""A small experiment file on a tiny model, for tests of any stage of a sweep."""

from collections.abc import Sequence
from pathlib import Path

from mpcache.collection.collect import collect
from mptrain.experiments.experiment_file import read_experiment
from mptrain.experiments.spec import Experiment
from tests.helpers.stores import small_config

TEXT = """title = "tiny"
folder = "{folder}/run"
store = "{folder}/store"

[data]
rows = 384
batch_rows = 64
window_rows = 128

[evaluation]
eval_every = 2
eval_rows = 256

[run]
save_every = 2
log_every = 1
device = "cpu"

[coder]
expansion = 2

[optimizer]
lr = 0.01

[loss]
dead_rows = 200

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
    return read_experiment(write_experiment(folder), changes)


class CountedCollection:
    """Collects for a sweep; records the sides of each call."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.folder, self.calls, self.changes = folder, list[tuple[str, ...]](), changes

    def __call__(self, sides: Sequence[str]) -> str:
        self.calls.append(tuple(sides))
        store = self.folder / "store"
        collect(small_config(self.folder, hookpoints=tuple(sides), **self.changes), store)
        return str(store)
