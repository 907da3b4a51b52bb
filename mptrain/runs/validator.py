"""Evaluates the coders of a pass as they would be saved now; training is not affected."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from mptrain.coders.coder import Coder
from mptrain.data.batches import release_after_use
from mptrain.evals.evaluate import Evaluation, calibrate_thresholds_, evaluate
from mptrain.runs.pass_context import TrainingPass


class Validator:
    """Evaluates on held-out rows. The time that it takes is added to the run's progress."""

    def __init__(self, training_pass: TrainingPass) -> None:
        self._pass = training_pass

    def snapshots(self) -> list[Coder | None]:
        """Return every coder as it would be saved now; None for a coder that has diverged."""
        with self._timed():
            coders = [
                None if run.diverged else run.trainer.evaluated() for run in self._pass.coder_runs
            ]
            if self._pass.calibration is not None:
                healthy = [coder for coder in coders if coder is not None]
                calibrate_thresholds_(healthy, self._pass.calibration, self._pass.filters)
        return coders

    def evaluate(
        self, coders: Sequence[Coder | None], max_rows: int | None
    ) -> list[Evaluation | None]:
        """Evaluate all coders on the same rows: the first `max_rows`, or all with a progress bar.

        The evaluation of a coder that is None is None.
        """
        with self._timed():
            loader = self._pass.validation
            batches = release_after_use(loader.one_pass(max_rows))
            if max_rows is None:
                total = -(-loader.rows // self._pass.config.batch_rows)
                quiet = self._pass.quiet
                batches = iter(tqdm(batches, "validate", total, unit="batch", disable=quiet))
            healthy = [(c, c.config.k, c.config.codes) for c in coders if c is not None]
            evaluations = iter(evaluate(healthy, batches, self._pass.filters))
        return [None if coder is None else next(evaluations) for coder in coders]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._pass.progress.validation_seconds += time.perf_counter() - started
