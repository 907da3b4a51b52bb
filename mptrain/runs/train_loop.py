"""The train loop of a pass: train steps, and between them evaluation, records and saved states."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from tqdm import tqdm

from mptrain.data.batches import release_after_use
from mptrain.data.loader import Batch
from mptrain.evals.evaluate import Evaluation
from mptrain.runs.checkpointer import Checkpointer
from mptrain.runs.coder_steps import CoderSteps
from mptrain.runs.convergence import validation_steps
from mptrain.runs.finish import finish_pass
from mptrain.runs.metrics_sink import MetricsSink
from mptrain.runs.pass_context import TrainingPass
from mptrain.runs.results import CoderResult
from mptrain.runs.signals import deferred_interrupts
from mptrain.runs.step_records import make_record, progress_summary
from mptrain.runs.validator import Validator
from mptrain.training.setup import CoderRun
from mptrain.training.step_result import StepResult

OnStep = Callable[[int, Sequence[CoderRun]], None]


class TrainLoop:
    """Trains the coders of a pass, each on the rows of the same batches."""

    def __init__(self, training_pass: TrainingPass, on_step: OnStep | None = None) -> None:
        self._pass = training_pass
        self._on_step = on_step
        self._coder_steps = CoderSteps(training_pass)
        self._sink = MetricsSink(training_pass)
        self._validator = Validator(training_pass)
        self._checkpointer = Checkpointer(training_pass, self._sink)
        config = training_pass.config
        self._validation_steps = frozenset(validation_steps(training_pass.steps, config.eval_every))
        self._waited_before = training_pass.progress.wait_seconds

    def run(self) -> list[CoderResult]:
        """Train from the last saved state to the last step; then evaluate and save all coders.

        Training ends early where every coder has diverged. Returns the results of this pass and
        of the passes before it.
        """
        self._checkpointer.resume()
        self._sink.rewind()
        with closing(self._sink):
            self._train()
        return finish_pass(self._pass, self._validator, self._sink)

    def _train(self) -> None:
        config, processes, progress = self._pass.config, self._pass.processes, self._pass.progress
        first = progress.step + 1
        batches = release_after_use(self._pass.train.batches(progress.step * config.batch_rows))
        with deferred_interrupts() as pending_interrupt, self._progress_bar() as bar:
            for step in range(first, self._pass.steps + 1):
                if not processes.any(any(not run.diverged for run in self._pass.coder_runs)):
                    break
                batch = next(batches)
                if step == first:
                    self._coder_steps.compile_kernels(batch)
                if self._on_step is not None:
                    self._on_step(step, self._pass.coder_runs)
                self._train_and_observe(step, batch, bar)
                progress.step, progress.wait_seconds = step, self._wait_seconds
                interrupt = pending_interrupt()
                stops = processes.any(interrupt is not None)
                if stops or self._checkpointer.is_due(step):
                    self._checkpointer.save(step)
                if stops:
                    raise interrupt or KeyboardInterrupt
        self._sink.write()  # coders that diverged in the last step have records to write

    @contextmanager
    def _progress_bar(self) -> "Iterator[tqdm[Any]]":
        progress, batch_rows = self._pass.progress, self._pass.config.batch_rows
        title = f"fit {len(progress.names)} coders"
        if len(progress.passes) > 1:
            title += f", pass {progress.pass_index + 1} of {len(progress.passes)}"
        with tqdm(
            total=self._pass.steps * batch_rows,
            initial=progress.step * batch_rows,
            desc=title,
            unit="row",
            unit_scale=True,
            disable=self._pass.quiet,
        ) as bar:
            yield bar

    def _train_and_observe(self, step: int, batch: Batch, bar: "tqdm[Any]") -> None:
        config = self._pass.config
        results = self._coder_steps.step_(batch)
        bar.update(config.batch_rows)
        evaluations: Sequence[Evaluation | None] = [None] * len(results)
        is_evaluated = step in self._validation_steps
        if is_evaluated:
            evaluations = self._validator.evaluate(self._validator.snapshots(), config.eval_rows)
        is_due = is_evaluated or step % config.log_every == 0
        self._record(step, is_due, results, evaluations)
        if is_due and results:  # a process may have no coder in a pass
            seconds = self._wait_seconds, self._train_seconds
            bar.set_postfix_str(progress_summary(results, *seconds))

    def _record(
        self,
        step: int,
        is_due: bool,
        results: Sequence[StepResult | None],
        evaluations: Sequence[Evaluation | None],
    ) -> None:
        """Record each coder where a record is due, and each coder that diverged in this step."""
        seconds = self._wait_seconds, self._pass.progress.validation_seconds
        for run, result, evaluation in zip(
            self._pass.coder_runs, results, evaluations, strict=True
        ):
            just_diverged = run.diverged and result is not None
            if just_diverged or (is_due and not run.diverged):
                self._sink.add(make_record(step, run, result, evaluation, *seconds))
        if is_due:
            self._sink.write()

    @property
    def _wait_seconds(self) -> float:
        return self._waited_before + self._pass.train.wait_seconds

    @property
    def _train_seconds(self) -> float:
        """Seconds in train steps, including the passes before this one."""
        before = sum(result.train_seconds for result in self._pass.progress.finished)
        return before + sum(run.train_seconds for run in self._pass.coder_runs)
