"""Training that is killed at a given moment: a train step, or a call of a function that writes.

Imports no more than a run needs: each process that is to be killed imports this module again.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mptrain.coders import checkpoint
from mptrain.config.coder_grid import FitConfig
from mptrain.data import atomic_files
from mptrain.experiments.experiment_file import read_experiment
from mptrain.experiments.sweep import sweep
from mptrain.runs import metrics_file
from mptrain.runs.fit import fit
from mptrain.training.train_step import CoderTrainer


class Killer:
    """Kills its own process, by SIGKILL, at the n-th of the moments of one kind."""

    def __init__(self, kind: str, moment: int, log: Path) -> None:
        self.kind, self.left, self.log = kind, moment, log

    def reach(self, kind: str, name: str) -> bool:
        self.left -= kind == self.kind
        if kind != self.kind or self.left:
            return False
        with self.log.open("a") as file:
            file.write(f"{name}\n")
        return True

    def before(self, kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*args: Any, **kwargs: Any) -> Any:
            if self.reach(kind, name):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return killed

    def in_the_middle(self, kind: str, name: str, save: Callable[..., Any]) -> Callable[..., Any]:
        """Kill the process with half of the file written."""

        def killed(tensors: Any, path: Path) -> None:
            save(tensors, path)
            if self.reach(kind, name):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        return killed


def torn(killer: Killer) -> Callable[..., Any]:
    """Kill the process with half of a line written to metrics.jsonl."""
    write = metrics_file.MetricsFile._write

    def killed(self: metrics_file.MetricsFile, **options: Any) -> None:
        if self._pending and killer.reach("train", "half a line"):
            with self.path.open("ab") as file:
                file.write(self._pending[: len(self._pending) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, **options)

    return killed


def fit_until_killed(settings: FitConfig, kind: str, moment: int, log: Path) -> None:
    """Runs in a separate process; moment 0 never comes."""
    arm(kind, moment, log)
    fit(settings)


def sweep_until_killed(
    file: Path, collected: dict[str, str], store: str, kind: str, moment: int, log: Path
) -> None:
    """The same for a sweep whose store exists."""
    arm(kind, moment, log)
    experiment = read_experiment(file)
    sweep(experiment, collect=lambda _: store, collect_settings=collected, hardware="two cores")


def arm(kind: str, moment: int, log: Path) -> None:
    """Let this process be killed at the given moment."""
    killer = Killer(kind, moment, log)
    CoderTrainer.step = killer.before("train", "train step", CoderTrainer.step)  # type: ignore[method-assign]
    metrics_file.MetricsFile._write = torn(killer)  # type: ignore[method-assign]
    checkpoint.save_file = killer.before("save", "before tensors", checkpoint.save_file)
    checkpoint.save_file = killer.in_the_middle("save", "half of the tensors", checkpoint.save_file)
    atomic_files.sync = killer.before("save", "sync", atomic_files.sync)
    path: Any = Path
    path.rename = killer.before("save", "rename", path.rename)
    path.replace = killer.before("save", "replace", path.replace)
    shutil.rmtree = killer.before("save", "drop", shutil.rmtree)  # type: ignore[assignment]
