"""Train a grid of coders while a store is read; the same command goes on where it stopped."""

import sys
import time
import warnings
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mptrain.coders.checkpoint import save_coder
from mptrain.coders.coder import Coder
from mptrain.config.coder import all_sides
from mptrain.config.run import RunConfig
from mptrain.config.sides import Side
from mptrain.data.atomic_files import write_json
from mptrain.data.filters import Filters, make_filters
from mptrain.data.loader import Batch, Loader, Store
from mptrain.data.preflight import open_trainable_store, refuse_constant
from mptrain.evals.evaluate import Evaluation, calibrate_, evaluate
from mptrain.kernels.device import resolve_device
from mptrain.runs.loggers import MetricLoggers, check_installed
from mptrain.runs.metrics import MetricsFile, Record, rewind
from mptrain.runs.plan import RunPlan, make_plan
from mptrain.runs.records import make_record, progress_summary
from mptrain.runs.results import result_of
from mptrain.runs.run_dir import RunFolder, check_same_run, open_run, recorded_parts
from mptrain.runs.saved_state import load_state, save_state
from mptrain.runs.signals import deferred_interrupts
from mptrain.runs.state import RunProgress, gathered, load_progress, restore_
from mptrain.training.distributed import SINGLE_PROCESS, ProcessGroup, joined
from mptrain.training.setup import CoderRun, make_coder_run, make_loader, train_steps
from mptrain.training.train_step import StepResult


def fit(
    config: RunConfig, *, quiet: bool = True, parts: Collection[int] | None = None
) -> list[dict[str, Any]]:
    """Train, evaluate and save every coder of the grid; gives a row of results for each.

    `parts` are those of the store that a new run is to read, all if None; one that goes on reads
    those that it began with.

    Among processes that torchrun started, the part of this one; the first gives all results.

    Raises:
        KeyboardInterrupt: on Ctrl-C, as Terminated on SIGTERM; in training, the step in hand is
            ended and the state saved.
        ValueError: the user's mistake, or non-finite values in the store.
        DamagedStoreError (an OSError): the store's bytes are not what was committed.
    """
    with joined(config) as ranks:
        return _fit(config, ranks, quiet or not ranks.is_first, parts)


def _fit(
    config: RunConfig, ranks: ProcessGroup, quiet: bool, only_parts: Collection[int] | None
) -> list[dict[str, Any]]:
    if not ranks.is_first:
        ranks.meet()  # the run has begun then: all take the parts that it began with
    device = resolve_device(config.device)
    coders = {one.name: one for one in config.coders()}
    begun = load_progress(Path(config.run), list(coders))
    store, plan = _planned(config, device, ranks, only_parts, begun, quiet=quiet)
    if plan.epochs > 1 and not quiet:
        rows = f"{config.rows:,} rows are {plan.epochs:.3g} epochs of the {plan.train_rows:,}"
        tqdm.write(f"{rows} train rows in {store.storage}", file=sys.stderr)
    refuse_constant(store, all_sides(list(coders.values())))
    progress = begun or RunProgress(passes=plan.passes)
    first = progress.number
    while progress.number < len(progress.passes):
        together = [coders[name] for name in progress.names]
        own = ranks.coders(together)
        sides = all_sides(own or together)
        filters = make_filters(config, store, sides)
        coder_runs = [make_coder_run(one, config, filters, store, device, ranks) for one in own]
        with ExitStack() as stack:
            open_loader = partial(make_loader, config, store, filters=filters, device=device)
            train = stack.enter_context(open_loader(sides, "train", share=ranks.share))
            validation = stack.enter_context(open_loader(sides, "validation"))
            sample = None
            if batch := [coder for coder in own if coder.architecture.has_threshold]:
                sample = stack.enter_context(open_loader(all_sides(batch), "train"))
            parts = {part.number for loader in (train, validation) for part in loader.parts}
            run = open_run(config, store.source, store.fingerprint, train.order_digest, parts)
            if ranks.is_first and progress.number == first:
                ranks.meet()
            of_pass = (progress, coder_runs, filters, train, validation, sample)
            progress = progress.next_pass(TrainLoop(config, ranks, run, *of_pass, quiet).fit())
    return progress.finished


def plan_fit(config: RunConfig) -> RunPlan:
    """What `fit` would do; raises as it does, and writes nothing."""
    begun = load_progress(Path(config.run), [one.name for one in config.coders()])
    store, plan = _planned(
        config, resolve_device(config.device), SINGLE_PROCESS, None, begun, quiet=True
    )
    check_same_run(config, store.fingerprint)
    return plan


def _planned(
    config: RunConfig,
    device: torch.device,
    ranks: ProcessGroup,
    only_parts: Collection[int] | None,
    begun: RunProgress | None,
    *,
    quiet: bool,
) -> tuple[Store, RunPlan]:
    check_installed(config.log)
    everything = all_sides(config.coders())
    begun_with = recorded_parts(config)
    only_parts = only_parts if begun_with is None else begun_with
    store = open_trainable_store(config, everything, only_parts, quiet=quiet)
    return store, make_plan(config, store, device, ranks, begun.passes if begun else None)


class TrainLoop:
    """A pass over the store: train its coders, and at intervals log, validate and save."""

    def __init__(
        self,
        config: RunConfig,
        ranks: ProcessGroup,
        run: RunFolder,
        progress: RunProgress,
        coder_runs: Sequence[CoderRun],
        filters: Filters,
        train: Loader,
        validation: Loader,
        sample: Loader | None,
        quiet: bool,
    ) -> None:
        """`coder_runs`: the coders of the pass that this rank trains; `sample`: train rows from
        which those with a threshold get it.
        """
        self.config, self.ranks, self.run, self.quiet = config, ranks, run, quiet
        self.progress, self.filters = progress, filters
        self.coder_runs, self.train, self.validation = coder_runs, train, validation
        self.sample = sample
        self.records: list[Record] = []  # to be written
        self.device = train.device
        self.steps = train_steps(config)
        self.waited_before = progress.waited
        self.metrics = MetricsFile(run.metrics)
        followed = [one for one in config.coders() if one.name in progress.names]
        self.followers = MetricLoggers(config.log if ranks.is_first else (), run.folder, followed)
        self._saved_at = time.monotonic()

    def fit(self) -> list[dict[str, Any]]:
        """Train to the last step, or as long as a coder is left that has not diverged; then
        evaluate on the whole validation split and save.
        """
        self._continue()
        start = self.progress.step
        batches = self.train.batches(start * self.config.batch_rows)
        with (
            closing(self.followers),
            deferred_interrupts() as interrupted,
            tqdm(
                total=self.steps * self.config.batch_rows,
                initial=start * self.config.batch_rows,
                desc=self._told(),
                unit="row",
                unit_scale=True,
                disable=self.quiet,
            ) as bar,
        ):
            for step in range(start + 1, self.steps + 1):
                if not self.ranks.any(any(not coder_run.diverged for coder_run in self.coder_runs)):
                    break
                batch = next(batches)
                if step == start + 1:
                    self._rehearse(batch)
                self._train_and_observe(step, batch, bar)
                self.progress.step, self.progress.waited = step, self._waited
                signalled = interrupted()
                stops = self.ranks.any(signalled is not None)
                if stops or self.ranks.any(self._is_save_due(step)):
                    self._save(step)
                if stops:
                    raise signalled or KeyboardInterrupt
        return self._finish()

    def _told(self) -> str:
        told, passes = f"fit {len(self.progress.names)} coders", len(self.progress.passes)
        return f"{told}, pass {self.progress.number + 1} of {passes}" if passes > 1 else told

    def _train_and_observe(self, step: int, batch: Batch, bar: "tqdm[Any]") -> None:
        results = self._train(batch)
        bar.update(self.config.batch_rows)
        evaluations: list[Evaluation | None] = [None] * len(self.coder_runs)
        is_evaluated = step % self.config.eval_every == 0 or step == self.steps
        if is_evaluated:
            evaluations = self._evaluate(self._coders(), self.config.eval_rows)
        is_due = is_evaluated or step % self.config.log_every == 0
        self._log(step, is_due, results, evaluations)
        if is_due and self.coder_runs:  # a rank may have none of a pass
            bar.set_postfix_str(progress_summary(results, self._waited, self._trained))

    def _train(self, batch: Batch) -> list[StepResult | None]:
        return [
            None if coder_run.diverged else self._train_one(coder_run, *rows)
            for coder_run, rows in zip(self.coder_runs, self._rows_of_each(batch), strict=True)
        ]

    def _rehearse(self, batch: Batch) -> None:
        """Have what train steps need compiled now, so that no coder's train time has it in it."""
        rehearsed = set()
        for coder_run, rows in zip(self.coder_runs, self._rows_of_each(batch), strict=True):
            alike = replace(
                coder_run.config, inputs=("any:output",), targets=("any:output",), seed=0, lr=None
            )
            if alike not in rehearsed and not coder_run.diverged:
                coder_run.trainer.rehearse(*rows)
                rehearsed.add(alike)

    def _rows_of_each(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Input and target rows of each coder, filtered once for coders with the same sides."""
        filtered: dict[tuple[Side, Side], tuple[Tensor, Tensor]] = {}
        for coder_run in self.coder_runs:
            if coder_run.sides not in filtered:
                filtered[coder_run.sides] = self._filtered(batch, *coder_run.sides)
        return [filtered[coder_run.sides] for coder_run in self.coder_runs]

    def _filtered(self, batch: Batch, source: Side, target: Side) -> tuple[Tensor, Tensor]:
        kept_B = self.filters.kept(batch, (source, target))
        x_BD = batch.values[source][kept_B].float()
        if target == source:
            return x_BD, x_BD
        return x_BD, batch.values[target][kept_B].float()

    def _train_one(self, coder_run: CoderRun, x_BD: Tensor, y_BE: Tensor) -> StepResult | None:
        coder_run.lr = coder_run.trainer.optimizers.lr
        rows = self.ranks.total(len(x_BD))
        coder_run.rows_read += self.config.batch_rows
        if not rows:
            return None  # the mean over no rows would be NaN
        self._synchronise()
        began = time.perf_counter()
        result = coder_run.trainer.step(x_BD, y_BE)
        coder_run.diverged = not bool(result.loss.isfinite())
        self._synchronise()
        coder_run.train_seconds += time.perf_counter() - began
        coder_run.rows_trained += rows
        return result

    def _coders(self) -> list[Coder | None]:
        """Every coder as it would be saved now; None for those that diverged."""
        began = time.perf_counter()
        coders = [None if t.diverged else t.trainer.evaluated() for t in self.coder_runs]
        if self.sample is not None:
            healthy = [coder for coder in coders if coder is not None]
            calibrate_(healthy, self.sample, self.filters)
        self.progress.validated += time.perf_counter() - began
        return coders

    def _evaluate(
        self, coders: Sequence[Coder | None], max_rows: int | None
    ) -> list[Evaluation | None]:
        """Of every coder on the same held-out rows; None for those that diverged."""
        began = time.perf_counter()
        batches = self.validation.one_pass(max_rows)
        if max_rows is None:  # the last one, of all rows: it takes a while
            steps = -(-self.validation.rows // self.config.batch_rows)
            batches = iter(tqdm(batches, "validate", steps, unit="batch", disable=self.quiet))
        healthy = [(c, c.config.k, c.config.codes) for c in coders if c is not None]
        evaluations = iter(evaluate(healthy, batches, self.filters))
        self.progress.validated += time.perf_counter() - began
        return [None if coder is None else next(evaluations) for coder in coders]

    def _log(
        self,
        step: int,
        is_due: bool,
        results: Sequence[StepResult | None],
        evaluations: Sequence[Evaluation | None],
    ) -> None:
        """A record of each coder where one is due, and a last one of those that diverge here."""
        for coder_run, result, evaluation in zip(
            self.coder_runs, results, evaluations, strict=True
        ):
            just_diverged = coder_run.diverged and result is not None
            if just_diverged or (is_due and not coder_run.diverged):
                seconds = (self._waited, self.progress.validated)
                self.records.append(make_record(step, coder_run, result, evaluation, *seconds))
        if is_due:
            self._write_records()

    def _write_records(self) -> None:
        """Write those of all ranks, in the order in which one rank alone would have."""
        found = self.ranks.gathered([asdict(record) for record in self.records])
        records, self.records = [Record(**one) for one in found], []
        if self.ranks.is_first:
            for record in sorted(records, key=lambda r: (r.step, self._place(r.coder))):
                self.metrics.add(record)
                self.followers.add(record)

    def _place(self, coder: str) -> int:
        return self.progress.names.index(coder)

    @property
    def _waited(self) -> float:
        return self.waited_before + self.train.wait_seconds

    @property
    def _trained(self) -> float:
        """Seconds in train steps, of the passes before too."""
        before = sum(result["train_seconds"] for result in self.progress.finished)
        return float(before + sum(coder_run.train_seconds for coder_run in self.coder_runs))

    def _is_save_due(self, step: int) -> bool:
        minutes = self.config.save_minutes
        is_time = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return is_time or step % self.config.save_every == 0 or step == self.steps

    def _save(self, step: int) -> None:
        """Keep the state. Where the disk does not take it, the one before it is still there."""
        self._saved_at = time.monotonic()
        self._write_records()
        state = gathered(self.progress, self.coder_runs, self.ranks)
        if not self.ranks.is_first:
            return
        number = self.progress.number * self.steps + step
        try:
            self.metrics.flush()  # a state without its lines would be continued without them
            save_state(self.run.folder, number, *state)
        except OSError as error:
            warnings.warn(
                f"the state after train step {step} is not saved ({error.strerror}); the one "
                "before it is kept, training goes on, and the next save tries again",
                RuntimeWarning,
                stacklevel=2,
            )

    def _continue(self) -> None:
        """Load the last state, if it is of this pass, and drop the lines that are later."""
        if self.progress.step:
            state = load_state(self.run.folder)
            assert state is not None
            restore_(*state, self.coder_runs, self.config.batch_rows)
        if self.ranks.is_first:
            rewind(self.run.metrics, self._is_before)
            self.followers.catch_up(self.run.metrics)

    def _is_before(self, record: Record) -> bool:
        if record.coder in self.progress.finished_names:
            return True
        return record.coder in self.progress.names and record.step <= self.progress.step

    def _finish(self) -> list[dict[str, Any]]:
        """Evaluate all coders on the whole validation split, and save them with their results."""
        self._write_records()
        self.metrics.flush()
        coders = self._coders()
        evaluations = self._evaluate(coders, None)
        of_each = zip(self.coder_runs, coders, evaluations, strict=True)
        found = [self._judged(*one) for one in of_each]
        own = sorted(self.ranks.gathered(found), key=lambda r: self._place(r["coder"]))
        results = [*self.progress.finished, *own]
        if self.ranks.is_first:
            write_json(self.run.folder / "results.json", results)
        return results

    def _judged(
        self, coder_run: CoderRun, coder: Coder | None, evaluation: Evaluation | None
    ) -> dict[str, Any]:
        if evaluation is not None and evaluation.rows and not evaluation.is_finite:
            coder_run.diverged, evaluation = True, None  # in its last update
        if evaluation is not None and not evaluation.rows:
            evaluation = None
        result = result_of(coder_run, self.steps, self.config.batch_rows, evaluation)
        if self.ranks.writes_coders and coder is not None and not coder_run.diverged:
            folder = self.run.folder / "coders" / coder_run.config.name
            filters = self.filters.of(coder_run.sides).as_json()
            trained = {**self.run.provenance, **filters, **result}
            save_coder(folder, coder, trained)
        return result

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
