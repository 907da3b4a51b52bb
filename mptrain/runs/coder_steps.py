"""Train steps of all coders of a pass on one batch, each on the rows that its filters keep.

B rows in a batch, D input width, E target width.
"""

import time
from dataclasses import replace

import torch
from torch import Tensor

from mptrain.config.sides import Side, Sides
from mptrain.data.batches import Batch
from mptrain.runs.pass_context import TrainingPass
from mptrain.training.setup import CoderRun
from mptrain.training.step_result import StepResult


class CoderSteps:
    """Steps the coders of a pass one after another, and counts their rows and seconds."""

    def __init__(self, training_pass: TrainingPass) -> None:
        self._pass = training_pass

    def step_(self, batch: Batch) -> list[StepResult | None]:
        """Take a train step with every coder.

        The result of a coder is None where it has diverged, or where its filters keep no row.
        """
        return [
            None if run.diverged else self._step_coder_(run, *rows)
            for run, rows in zip(self._pass.coder_runs, self._rows_per_coder(batch), strict=True)
        ]

    def compile_kernels(self, batch: Batch) -> None:
        """Compile what train steps need, so that no coder's train time includes it."""
        compiled = set()
        for run, rows in zip(self._pass.coder_runs, self._rows_per_coder(batch), strict=True):
            without_names = replace(
                run.config, inputs=("any:output",), targets=("any:output",), seed=0, lr=None
            )
            if without_names not in compiled and not run.diverged:
                run.trainer.compile_kernels(*rows)
                compiled.add(without_names)

    def _rows_per_coder(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Input and target rows of each coder; coders with the same sides share their rows."""
        by_sides: dict[Sides, tuple[Tensor, Tensor]] = {}
        for run in self._pass.coder_runs:
            if run.sides not in by_sides:
                by_sides[run.sides] = self._filtered(batch, *run.sides)
        return [by_sides[run.sides] for run in self._pass.coder_runs]

    def _filtered(self, batch: Batch, source: Side, target: Side) -> tuple[Tensor, Tensor]:
        kept_B = self._pass.filters.kept(batch, (source, target))
        x_BD = batch.values[source][kept_B].float()
        if target == source:
            return x_BD, x_BD
        return x_BD, batch.values[target][kept_B].float()

    def _step_coder_(self, run: CoderRun, x_BD: Tensor, y_BE: Tensor) -> StepResult | None:
        run.lr = run.trainer.optimizers.lr
        rows = self._pass.processes.sum(len(x_BD))
        run.rows_read += self._pass.config.batch_rows
        if not rows:
            return None  # the mean over no rows would be NaN
        self._synchronize()
        started = time.perf_counter()
        result = run.trainer.step(x_BD, y_BE)
        run.diverged = not bool(result.loss.isfinite())
        self._synchronize()
        run.train_seconds += time.perf_counter() - started
        run.rows_trained += rows
        return result

    def _synchronize(self) -> None:
        if self._pass.device.type == "cuda":
            torch.cuda.synchronize(self._pass.device)
