"""How far a run is: what it keeps to go on from, bit for bit.

A run goes over the store in passes, each with some of its coders; train steps are counted in each.
All that is random is drawn from the config's seeds and the number of the train step, so no random
state has to be kept.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mptrain.checkpoint import load_about, load_state, save_state
from mptrain.trainee import Trainee


def keep(
    run: Path,
    number: int,
    step: int,
    steps: int,
    waited: float,
    validated: float,
    finished: Sequence[Mapping[str, Any]],
    trainees: Sequence[Trainee],
) -> None:
    """Keep pass `number` after `step` of its `steps`, with the results of the passes before it."""
    about = {
        "pass": number,
        "pass_step": step,
        "waited": waited,
        "validated": validated,
        "finished": list(finished),
        "train_seconds": {t.config.name: t.train_seconds for t in trainees},
        "diverged": [t.config.name for t in trainees if t.diverged],
    }
    tensors = {
        f"{trainee.config.name}/{name}": tensor
        for trainee in trainees
        for name, tensor in trainee.learner.state_tensors().items()
    }
    save_state(run, number * steps + step, about, tensors)


def first_pass(run: Path) -> int:
    """The pass that the last whole state is of; 0 where there is none."""
    about = load_about(run)
    return 0 if about is None else int(about["pass"])


def restore_(run: Path, number: int, trainees: Sequence[Trainee]) -> Mapping[str, Any] | None:
    """Bring coders to where pass `number` was kept; gives what else was. None: it begins."""
    found = load_state(run)
    if found is None or found[0]["pass"] != number:
        return None
    about, tensors = found
    for trainee in trainees:
        _restore_one_(trainee, about, tensors)
    return about


def _restore_one_(
    trainee: Trainee, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    prefix = f"{trainee.config.name}/"
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    trainee.learner.load_state_tensors_(own)
    trainee.train_seconds = about["train_seconds"][trainee.config.name]
    trainee.diverged = trainee.config.name in about["diverged"]
