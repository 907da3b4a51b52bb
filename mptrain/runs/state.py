"""How far a run is, and the state from which it continues bit for bit.

A run reads the store in passes, each with some of its coders; train steps are counted per pass. All
randomness is drawn from the config's seeds and the number of the train step, so that no random
state has to be saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpcache.errors import UsageError
from mptrain.runs.results import CoderResult
from mptrain.training.distributed import ProcessGroup
from mptrain.training.setup import CoderRun

STATE_FORMAT = 2  # tensors are named by the parts of coders


@dataclass(kw_only=True)
class RunProgress:
    """How far a run is."""

    passes: list[list[str]]
    "names of the coders of each pass; fixed when the run begins"
    pass_index: int = 0
    step: int = 0
    "train steps done in the current pass"
    wait_seconds: float = 0.0
    "time that the run waited for data"
    validation_seconds: float = 0.0
    finished: Sequence[CoderResult] = ()
    "results of the passes before the current one"

    @property
    def names(self) -> list[str]:
        """Names of the coders of the current pass."""
        return self.passes[self.pass_index]

    @property
    def finished_names(self) -> set[str]:
        return {result.coder for result in self.finished}

    def next_pass(self, results: Sequence[CoderResult]) -> "RunProgress":
        """Return the beginning of the next pass; `results` are those of all passes so far."""
        return RunProgress(
            passes=self.passes,
            pass_index=self.pass_index + 1,
            wait_seconds=self.wait_seconds,
            validation_seconds=self.validation_seconds,
            finished=results,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "passes": self.passes,
            "number": self.pass_index,
            "step": self.step,
            "waited": self.wait_seconds,
            "validated": self.validation_seconds,
            "finished": [result.to_json() for result in self.finished],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunProgress":
        return cls(
            passes=values["passes"],
            pass_index=values["number"],
            step=values["step"],
            wait_seconds=values["waited"],
            validation_seconds=values["validated"],
            finished=[CoderResult.from_json(result) for result in values["finished"]],
        )


@dataclass(frozen=True, kw_only=True)
class CoderCounters:
    """What a coder's training has cost so far."""

    train_seconds: float
    rows_read: int
    rows_trained: int
    diverged: bool


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A saved state without its tensors."""

    progress: RunProgress
    coders: Mapping[str, CoderCounters]
    "by the names of the coders of the current pass"

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": STATE_FORMAT,
            "progress": self.progress.to_json(),
            "train_seconds": {name: coder.train_seconds for name, coder in self.coders.items()},
            "rows": {n: [coder.rows_read, coder.rows_trained] for n, coder in self.coders.items()},
            "diverged": [name for name, coder in self.coders.items() if coder.diverged],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunState":
        version = values.get("format_version", 1)
        if version != STATE_FORMAT:
            raise UsageError(f"its format version is {version}, not {STATE_FORMAT}")
        rows, diverged = values["rows"], values["diverged"]
        return cls(
            progress=RunProgress.from_json(values["progress"]),
            coders={
                name: CoderCounters(
                    train_seconds=seconds,
                    rows_read=rows[name][0],
                    rows_trained=rows[name][1],
                    diverged=name in diverged,
                )
                for name, seconds in values["train_seconds"].items()
            },
        )


def gather_state(
    progress: RunProgress, coder_runs: Sequence[CoderRun], processes: ProcessGroup
) -> tuple[RunState, dict[str, Tensor]]:
    """Return the state of a run and the tensors of its coders; complete on the first process only.

    Waits for all processes, so that a process that failed stops the save.
    """
    own = [(r.config.name, r.train_seconds, r.rows_read, r.rows_trained, r.diverged)
           for r in coder_runs]  # fmt: skip
    coders = {
        name: CoderCounters(
            train_seconds=seconds, rows_read=read, rows_trained=trained, diverged=diverged
        )
        for name, seconds, read, trained, diverged in processes.gather(own)
    }
    tensors = {
        f"{coder_run.config.name}/{name}": tensor
        for coder_run in coder_runs
        for name, tensor in coder_run.trainer.state_tensors().items()
    }
    return RunState(progress=progress, coders=coders), processes.gather_tensors(tensors)


def restore_state_(
    state: RunState, tensors: Mapping[str, Tensor], coder_runs: Sequence[CoderRun]
) -> None:
    """Bring coders to a saved state."""
    for coder_run in coder_runs:
        name = coder_run.config.name
        prefix = f"{name}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        coder_run.trainer.load_state_tensors_(own)
        counters = state.coders[name]
        coder_run.train_seconds = counters.train_seconds
        coder_run.rows_read, coder_run.rows_trained = counters.rows_read, counters.rows_trained
        coder_run.diverged = counters.diverged
