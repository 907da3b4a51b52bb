"""What a train step adds to the metrics of a run: a record per coder, and the words at the bar."""

import math
import sys
from collections.abc import Sequence

import torch

from mptrain.evals.evaluate import Evaluation
from mptrain.runs.metrics_file import Record
from mptrain.training.setup import CoderRun
from mptrain.training.step_result import StepResult


def make_record(
    step: int,
    coder_run: CoderRun,
    result: StepResult | None,
    evaluation: Evaluation | None,
    wait_seconds: float,
    validation_seconds: float,
) -> Record:
    """Return the record of a coder after its train step.

    `result` is None where the coder's batch had no rows, `evaluation` where none was due.
    """
    validation_fvu = None if evaluation is None or not evaluation.rows else evaluation.fvu
    return Record(
        coder=coder_run.config.name,
        step=step,
        rows=coder_run.rows_read,
        rows_trained=coder_run.rows_trained,
        train_seconds=coder_run.train_seconds,
        wait_seconds=wait_seconds,
        validation_seconds=validation_seconds,
        fvu=math.nan if result is None else float(result.fvu),
        validation_fvu=math.nan if coder_run.diverged else validation_fvu,
        l0=math.nan if result is None else float(result.l0),
        dead_share=float(coder_run.trainer.usage.dead_share(coder_run.trainer.dead_rows)),
        lr=coder_run.lr,
        rows_per_second=coder_run.rows_per_second,
        peak_memory_bytes=peak_memory_bytes(coder_run.trainer.coder.b_D.device),
    )


def progress_summary(
    results: Sequence[StepResult | None], wait_seconds: float, train_seconds: float
) -> str:
    """Return the range of the coders' FVU, and the share of time that the run waits for data."""
    wait_share = wait_seconds / (wait_seconds + train_seconds)
    fvus = [float(result.fvu) for result in results if result is not None]
    fvu_range = f"FVU {min(fvus):.3f} to {max(fvus):.3f}, " if fvus else ""
    return f"{fvu_range}wait {wait_share:.0%}"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of a GPU's allocations, or on a CPU of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
