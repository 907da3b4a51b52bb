"""How far a run is: what it keeps to go on from, bit for bit.

A run goes over the store in passes, each with some of its coders; train steps are counted in each.
All that is random is drawn from the config's seeds and the number of the train step, so no random
state has to be kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mptrain.runs.saved_state import load_about
from mptrain.training.distributed import ProcessGroup
from mptrain.training.setup import CoderRun


@dataclass(kw_only=True)
class RunProgress:
    """Where a run is."""

    passes: list[list[str]]
    "names of the coders of each; fixed when the run begins"
    number: int = 0
    "of the pass, counted from 0"
    step: int = 0
    "train steps done in it"
    waited: float = 0.0
    "seconds that it waited for data"
    validated: float = 0.0
    "seconds that its validations took"
    finished: list[dict[str, Any]] = field(default_factory=list)
    "results of the passes before it"

    @property
    def names(self) -> list[str]:
        """Coders of this pass."""
        return self.passes[self.number]

    @property
    def finished_names(self) -> set[str]:
        return {result["coder"] for result in self.finished}

    def next_pass(self, results: list[dict[str, Any]]) -> "RunProgress":
        """The beginning of the pass after this one, with all results so far."""
        return RunProgress(
            passes=self.passes,
            number=self.number + 1,
            waited=self.waited,
            validated=self.validated,
            finished=results,
        )


def load_progress(run: Path, names: Sequence[str]) -> RunProgress | None:
    """Where a run of these coders was kept last; None: it has yet to begin.

    Raises:
        ValueError: what was kept is damaged.
    """
    about = load_about(run)
    if about is None:
        return None
    progress = RunProgress(**about["progress"])
    is_of_these = {name for together in progress.passes for name in together} == set(names)
    return progress if is_of_these else None  # another run's config is told apart elsewhere


def gathered(
    progress: RunProgress, coder_runs: Sequence[CoderRun], ranks: ProcessGroup
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Where a run is, and the tensors of its coders: all of it on the first rank.

    Waits for all ranks, so that none may have failed on the way here.
    """
    about = {
        "progress": asdict(progress),
        "train_seconds": dict(
            ranks.gathered([(t.config.name, t.train_seconds) for t in coder_runs])
        ),
        "rows": dict(
            ranks.gathered([(t.config.name, [t.rows_read, t.rows_trained]) for t in coder_runs])
        ),
        "diverged": ranks.gathered([t.config.name for t in coder_runs if t.diverged]),
    }
    tensors = {
        f"{coder_run.config.name}/{name}": tensor
        for coder_run in coder_runs
        for name, tensor in coder_run.trainer.state_tensors().items()
    }
    return about, ranks.gathered_tensors(tensors)


def restore_(
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    coder_runs: Sequence[CoderRun],
    batch_rows: int,
) -> None:
    """Bring coders to where they were, from what `load_state` gives."""
    # a state of an earlier version has no counts of each coder's rows
    all_rows = about["progress"]["step"] * batch_rows
    rows = about.get("rows", {})
    for coder_run in coder_runs:
        name = coder_run.config.name
        prefix = f"{name}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        coder_run.trainer.load_state_tensors_(own)
        coder_run.train_seconds = about["train_seconds"][name]
        coder_run.rows_read, coder_run.rows_trained = rows.get(name, (all_rows, all_rows))
        coder_run.diverged = name in about["diverged"]
