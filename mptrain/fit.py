"""Train a grid of coders in one pass over a store; the same command goes on where it stopped."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mptrain.batches import resolve_device
from mptrain.checkpoint import load_state, save_coder, save_state, write_json
from mptrain.config import RunConfig
from mptrain.evaluate import Evaluation, evaluate, sides_of
from mptrain.interrupt import held_interrupt
from mptrain.loader import Batch, Loader, Side, Store, kept_rows, open_store
from mptrain.metrics import append, rewind
from mptrain.observe import in_short, record_of
from mptrain.runs import Run, open_run
from mptrain.suited import refuse_unsuited
from mptrain.train_step import StepResult
from mptrain.trainee import Trainee, make_trainee, train_steps


def fit(config: RunConfig, *, quiet: bool = True) -> list[dict[str, Any]]:
    """Train, evaluate and save every coder of the grid; gives a row of results for each.

    Raises:
        KeyboardInterrupt: on Ctrl-C; in training, the step in hand is ended and the state saved.
        ValueError: the user's mistake, or non-finite values in the store.
        DamagedStoreError (an OSError): the store's bytes are not what was committed.
    """
    store = open_store(config.store)
    device = resolve_device(config.device)
    grid = config.coders()
    sides = tuple(dict.fromkeys(side for one in grid for side in sides_of(one)))
    refuse_unsuited(config, store, sides)
    trainees = [make_trainee(one, config, store, device) for one in grid]
    with (
        _loader(config, store, sides, "train", device) as train,
        _loader(config, store, sides, "validation", device) as validation,
    ):
        run = open_run(config, store.source, store.fingerprint, train.order_digest)
        return Fitting(config, run, trainees, train, validation, quiet).fit()


class Fitting:
    """The loop over batches: train every coder, and at intervals log, validate and save."""

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        trainees: Sequence[Trainee],
        train: Loader,
        validation: Loader,
        quiet: bool,
    ) -> None:
        self.config, self.run, self.quiet = config, run, quiet
        self.trainees, self.train, self.validation = trainees, train, validation
        self.device = train.device
        self.steps = train_steps(config)
        self.waited_before = 0.0  # in earlier calls of this run

    def fit(self) -> list[dict[str, Any]]:
        """Train to the last step, then evaluate on the whole validation split and save."""
        start = self._continue()
        batches = self.train.batches(start * self.config.batch_rows)
        with (
            held_interrupt() as interrupted,
            tqdm(
                total=self.steps * self.config.batch_rows,
                initial=start * self.config.batch_rows,
                desc=f"fit {len(self.trainees)} coders",
                unit="row",
                unit_scale=True,
                disable=self.quiet,
            ) as bar,
        ):
            for step in range(start + 1, self.steps + 1):
                self._train_and_observe(step, next(batches), bar)
                stops = interrupted()
                if stops or step % self.config.save_every == 0 or step == self.steps:
                    self._save(step)
                if stops:
                    raise KeyboardInterrupt
        return self._finish()

    def _train_and_observe(self, step: int, batch: Batch, bar: "tqdm[Any]") -> None:
        results = self._train(batch)
        bar.update(batch.rows)
        evaluations: list[Evaluation | None] = [None] * len(self.trainees)
        is_evaluated = step % self.config.eval_every == 0 or step == self.steps
        if is_evaluated:
            evaluations = self._evaluate(self.config.eval_rows)
        is_due = is_evaluated or step % self.config.log_every == 0
        self._log(step, is_due, results, evaluations)
        if is_due:
            bar.set_postfix_str(in_short(self.trainees, results, self._waited))

    def _train(self, batch: Batch) -> list[StepResult | None]:
        return [
            None if trainee.diverged else self._train_one(trainee, *rows)
            for trainee, rows in zip(self.trainees, self._rows_of_each(batch), strict=True)
        ]

    def _rows_of_each(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Input and target rows of each coder, filtered once for coders with the same sides."""
        filtered: dict[tuple[Side, Side], tuple[Tensor, Tensor]] = {}
        for trainee in self.trainees:
            if trainee.sides not in filtered:
                filtered[trainee.sides] = self._filtered(batch, *trainee.sides)
        return [filtered[trainee.sides] for trainee in self.trainees]

    def _filtered(self, batch: Batch, source: Side, target: Side) -> tuple[Tensor, Tensor]:
        finite = (source, target) if self.config.allow_nonfinite else ()
        kept_B = kept_rows(batch, skip_positions=self.config.skip_positions, finite=finite)
        x_BD = batch.values[source][kept_B]
        return x_BD, x_BD if target == source else batch.values[target][kept_B]

    def _train_one(self, trainee: Trainee, x_BD: Tensor, y_BE: Tensor) -> StepResult | None:
        trainee.lr = trainee.learner.optimizers.lr
        if not len(x_BD):
            return None  # the mean over no rows would be NaN
        self._synchronise()
        began = time.perf_counter()
        result = trainee.learner.step(x_BD, y_BE)
        trainee.diverged = not bool(result.loss.isfinite())
        self._synchronise()
        trainee.train_seconds += time.perf_counter() - began
        return result

    def _evaluate(self, max_rows: int | None) -> list[Evaluation | None]:
        """Of every coder on the same held-out rows; None for those that diverged."""
        healthy = [trainee for trainee in self.trainees if not trainee.diverged]
        found = evaluate(
            [(t.learner.evaluated(), t.config.k, t.config.codes) for t in healthy],
            self.validation.one_pass(max_rows),
            skip_positions=self.config.skip_positions,
            finite_only=self.config.allow_nonfinite,
        )
        evaluations = iter(found)
        return [None if trainee.diverged else next(evaluations) for trainee in self.trainees]

    def _log(
        self,
        step: int,
        is_due: bool,
        results: Sequence[StepResult | None],
        evaluations: Sequence[Evaluation | None],
    ) -> None:
        """A record of each coder where one is due, and a last one of those that diverge here."""
        rows = step * self.config.batch_rows
        for trainee, result, evaluation in zip(self.trainees, results, evaluations, strict=True):
            just_diverged = trainee.diverged and result is not None
            if just_diverged or (is_due and not trainee.diverged):
                record = record_of(step, rows, trainee, result, evaluation, self._waited)
                append(self.run.metrics, record)

    @property
    def _waited(self) -> float:
        return self.waited_before + self.train.wait_seconds

    def _save(self, step: int) -> None:
        about = {
            "waited": self._waited,
            "train_seconds": {t.config.name: t.train_seconds for t in self.trainees},
            "diverged": [t.config.name for t in self.trainees if t.diverged],
        }
        tensors = {
            f"{trainee.config.name}/{name}": tensor
            for trainee in self.trainees
            for name, tensor in trainee.learner.state_tensors().items()
        }
        save_state(self.run.folder, step, about, tensors)

    def _continue(self) -> int:
        """Load the last state of the run, if there is one; gives the step it was taken after."""
        found = load_state(self.run.folder)
        about, tensors = found or ({"step": 0}, {})
        rewind(self.run.metrics, about["step"])
        if found:
            self.waited_before = about["waited"]
            for trainee in self.trainees:
                self._continue_one(trainee, about, tensors)
        return int(about["step"])

    def _continue_one(
        self, trainee: Trainee, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        prefix = f"{trainee.config.name}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        trainee.learner.load_state_tensors_(own)
        trainee.train_seconds = about["train_seconds"][trainee.config.name]
        trainee.diverged = trainee.config.name in about["diverged"]

    def _finish(self) -> list[dict[str, Any]]:
        results = []
        for trainee, evaluation in zip(self.trainees, self._evaluate(None), strict=True):
            if evaluation is not None and not evaluation.is_finite:
                trainee.diverged, evaluation = True, None  # in its last update
            result = self._result(trainee, evaluation)
            results.append(result)
            if not trainee.diverged:
                folder = self.run.folder / "coders" / trainee.config.name
                save_coder(folder, trainee.learner.evaluated(), {**self.run.provenance, **result})
        write_json(self.run.folder / "results.json", results)
        return results

    def _result(self, trainee: Trainee, evaluation: Evaluation | None) -> dict[str, Any]:
        rows = self.steps * self.config.batch_rows
        return {
            "coder": trainee.config.name,
            "diverged": trainee.diverged,
            "rows_trained": rows,
            "train_seconds": trainee.train_seconds,
            "rows_per_second": trainee.rows_per_second(rows),
            "validation": None if evaluation is None else asdict(evaluation),
        }

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _loader(
    config: RunConfig,
    store: Store,
    sides: Sequence[Side],
    split: Literal["train", "validation"],
    device: torch.device,
) -> Loader:
    return Loader(
        store,
        sides,
        split,
        batch_rows=config.batch_rows,
        seed=config.order_seed,
        window_rows=config.window_rows,
        device=device,
    )
