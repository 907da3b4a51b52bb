"""Train a grid of coders in one pass over a store; the same command goes on where it stopped."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mptrain.batches import resolve_device
from mptrain.checkpoint import load_state, save_coder, save_state, write_json
from mptrain.coder import Coder
from mptrain.config import FitConfig
from mptrain.evaluate import Evaluation, evaluate, sides_of
from mptrain.loader import Batch, Loader, Side, Store, kept_rows, open_store
from mptrain.metrics import Record, append, rewind
from mptrain.optimize import make_optimizers
from mptrain.recipe import CoderConfig
from mptrain.runs import Run, open_run
from mptrain.train_step import Learner, StepResult

_SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


@dataclass(kw_only=True)
class Trainee:
    """One coder of the grid with what its training has cost so far."""

    config: CoderConfig
    learner: Learner
    train_seconds: float = 0.0
    lr: float = 0.0
    "learning rate of the last train step"
    diverged: bool = False

    @property
    def sides(self) -> tuple[Side, Side]:
        return sides_of(self.config)

    def rows_per_second(self, rows: int) -> float:
        """Of this many rows read; 0 where no batch had a row to train on."""
        return rows / self.train_seconds if self.train_seconds else 0.0


def fit(config: FitConfig, *, quiet: bool = True) -> list[dict[str, Any]]:
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
    _refuse_skipping_all(config, store)
    _refuse_uneven(store, sides)
    _refuse_nonfinite(config, store, sides)
    trainees = [make_trainee(one, config, store, device) for one in grid]
    with (
        _loader(config, store, sides, "train", device) as train,
        _loader(config, store, sides, "validation", device) as validation,
    ):
        run = open_run(config, store.source, store.fingerprint, train.order_digest)
        return Fitting(config, run, trainees, train, validation, quiet).fit()


def train_steps(config: FitConfig) -> int:
    """Whole batches in the rows to train on."""
    return config.rows // config.batch_rows


def make_trainee(
    config: CoderConfig, run: FitConfig, store: Store, device: torch.device
) -> Trainee:
    """A coder at its start: biases at the means of the train split, atoms drawn by its seed."""
    (input_side, target_side) = sides_of(config)
    input_mean_D, input_variance_D = store.moments(*input_side, "train")
    target_mean_E, target_variance_E = store.moments(*target_side, "train")
    coder = Coder(config, len(input_mean_D), len(target_mean_E))
    coder.initialise_(
        input_mean_D.float(), target_mean_E.float(), torch.Generator().manual_seed(config.seed)
    )
    coder.to(device)
    optimizers = make_optimizers(coder, config, train_steps(run))
    variances = float(target_variance_E.sum()), float(input_variance_D.sum())
    return Trainee(config=config, learner=Learner(coder, optimizers, *variances))


class Fitting:
    """The loop over batches: train every coder, and at intervals log, validate and save."""

    def __init__(
        self,
        config: FitConfig,
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
            self._show(results, bar)

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
            [(trainee.learner.coder, trainee.config.k) for trainee in healthy],
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
        for trainee, result, evaluation in zip(self.trainees, results, evaluations, strict=True):
            just_diverged = trainee.diverged and result is not None
            if just_diverged or (is_due and not trainee.diverged):
                append(self.run.metrics, self._record(step, trainee, result, evaluation))

    def _show(self, results: Sequence[StepResult | None], bar: "tqdm[Any]") -> None:
        fvus = [float(result.fvu) for result in results if result is not None]
        if fvus:
            bar.set_postfix_str(
                f"FVU {min(fvus):.3f} to {max(fvus):.3f}, wait {self._wait_share():.0%}"
            )

    def _record(
        self, step: int, trainee: Trainee, result: StepResult | None, evaluation: Evaluation | None
    ) -> Record:
        rows = step * self.config.batch_rows
        validation_fvu = None if evaluation is None else evaluation.fvu
        return Record(
            coder=trainee.config.name,
            step=step,
            rows=rows,
            train_seconds=trainee.train_seconds,
            wait_seconds=self.waited_before + self.train.wait_seconds,
            fvu=math.nan if result is None else float(result.fvu),
            validation_fvu=math.nan if trainee.diverged else validation_fvu,
            l0=math.nan if result is None else float(result.l0),
            dead_share=float(trainee.learner.dead_share(trainee.config.dead_rows)),
            lr=trainee.lr,
            rows_per_second=trainee.rows_per_second(rows),
            peak_memory_bytes=peak_memory_bytes(self.device),
        )

    def _wait_share(self) -> float:
        waited = self.waited_before + self.train.wait_seconds
        return waited / (waited + sum(trainee.train_seconds for trainee in self.trainees))

    def _save(self, step: int) -> None:
        about = {
            "waited": self.waited_before + self.train.wait_seconds,
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
                save_coder(folder, trainee.learner.coder, {**self.run.provenance, **result})
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


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the device's allocations on a GPU, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back a first Ctrl-C, and tell whether it came; a second one interrupts at once."""
    came = False

    def hold(*_: object) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    # only the main thread gets Ctrl-C, and a handler that someone else has set is theirs
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _loader(
    config: FitConfig,
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


def _refuse_skipping_all(config: FitConfig, store: Store) -> None:
    if config.skip_positions >= store.ctx_len:
        raise ValueError(
            "skip_positions must be less than ctx_len, got "
            f"skip_positions={config.skip_positions}, ctx_len={store.ctx_len}; use fewer"
        )


def _refuse_uneven(store: Store, sides: Sequence[Side]) -> None:
    """Common parts alone would make a coder's rows depend on its companions."""
    found = {
        side: {p.number for split in _SPLITS for p in store.parts([side], split)} for side in sides
    }
    everything = set[int]().union(*found.values())
    if any(parts != everything for parts in found.values()):
        told = "; ".join(
            f"{':'.join(side)} has parts {_ranges(parts)}" for side, parts in found.items()
        )
        raise ValueError(
            f"the sides in {store.path} have different parts ({told}); "
            "collect the missing parts, or fit the sides in separate runs"
        )


def _ranges(numbers: set[int]) -> str:
    """Ascending numbers as runs: 0-6, 8."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in pairs) or "none"


def _refuse_nonfinite(config: FitConfig, store: Store, sides: Sequence[Side]) -> None:
    bad = {":".join(side): count for side in sides if (count := store.nonfinite(*side))}
    if bad and not config.allow_nonfinite:
        told = ", ".join(f"{count} in {side}" for side, count in bad.items())
        raise ValueError(
            f"{config.store} holds non-finite values ({told}); "
            "collect with another --model-dtype or --dtype, or leave such rows out with "
            "--allow-nonfinite"
        )
