"""What one pass over a store works with: its coders, loaders, run folder and progress."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mptrain.config.run import RunConfig
from mptrain.data.filters import Filters
from mptrain.data.loader import Loader
from mptrain.runs.run_dir import RunFolder
from mptrain.runs.state import RunProgress
from mptrain.training.distributed import ProcessGroup
from mptrain.training.setup import CoderRun, train_steps


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """A pass over the store, as this process takes part in it."""

    config: RunConfig
    processes: ProcessGroup
    run: RunFolder
    progress: RunProgress
    "counted up while the pass trains"
    coder_runs: Sequence[CoderRun]
    "the coders of the pass that this process trains; may be empty"
    filters: Filters
    train: Loader
    validation: Loader
    calibration: Loader | None
    "train rows from which thresholds are set; None: no coder of this process has a threshold"
    quiet: bool

    @property
    def steps(self) -> int:
        """Train steps of the pass."""
        return train_steps(self.config)

    @property
    def device(self) -> torch.device:
        return self.train.device
