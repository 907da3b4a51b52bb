"""The results of a run's coders, and warnings about them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mptrain.config.coder import CoderConfig
from mptrain.config.coder_json import coder_config_from_json
from mptrain.data.atomic_files import read_json
from mptrain.evals.evaluate import Evaluation
from mptrain.runs.convergence import Convergence
from mptrain.training.setup import CoderRun

L0_TOLERANCE = 0.05  # of K


@dataclass(frozen=True, kw_only=True)
class CoderProgress:
    """How far a coder's training is. Counts and times are the coder's own.

    Other coders of the run may train on after a coder has diverged.
    """

    coder: str
    "name of the coder"
    diverged: bool
    "whether its loss was not finite in its last train step; such a coder is not saved"
    step: int
    "train steps done"
    steps: int
    "train steps planned"
    finished: bool
    "whether all planned train steps are done"
    rows_read: int
    "rows in the batches of its train steps"
    rows_trained: int
    "of `rows_read`, the rows that its filters kept"
    train_seconds: float
    "time in its train steps"
    rows_per_second: float
    "`rows_trained` by `train_seconds`"


@dataclass(frozen=True, kw_only=True)
class CoderResult(CoderProgress):
    """A coder at the end of its training: its entry in `results.json`."""

    validation: Evaluation | None
    "on all held-out rows; None: it diverged, or its filters keep no held-out row"
    warnings: Sequence[str]
    "what its user should know"
    convergence: Convergence | None = None
    "how its FVU fell in the end; None: it diverged, had too few validations, or is of an old run"

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain values."""
        return {**asdict(self), "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CoderResult":
        """Return the result that `to_json` wrote."""
        validation = values["validation"]
        evaluation = None if validation is None else Evaluation(**validation)
        stored = values.get("convergence")  # results of earlier versions have none
        convergence = None if stored is None else Convergence(**stored)
        return cls(**{**values, "validation": evaluation, "convergence": convergence})


def final_result(
    coder_run: CoderRun,
    steps: int,
    batch_rows: int,
    evaluation: Evaluation | None,
    convergence: Convergence | None,
) -> CoderResult:
    """Return the result of a coder; `evaluation` is on all held-out rows."""
    progress = coder_progress(coder_run, steps, batch_rows)
    return CoderResult(
        **_values(progress),
        validation=evaluation,
        warnings=tuple(_warnings(coder_run, progress.step, evaluation)),
        convergence=None if coder_run.diverged else convergence,
    )


def coder_progress(coder_run: CoderRun, steps: int, batch_rows: int) -> CoderProgress:
    """Return how far a coder is, of `steps` planned train steps."""
    step = coder_run.rows_read // batch_rows
    return CoderProgress(
        coder=coder_run.config.name,
        diverged=coder_run.diverged,
        step=step,
        steps=steps,
        finished=step == steps,
        rows_read=coder_run.rows_read,
        rows_trained=coder_run.rows_trained,
        train_seconds=coder_run.train_seconds,
        rows_per_second=coder_run.rows_per_second,
    )


def _values(progress: CoderProgress) -> dict[str, Any]:
    return {field.name: getattr(progress, field.name) for field in fields(CoderProgress)}


def _warnings(coder_run: CoderRun, step: int, evaluation: Evaluation | None) -> Iterator[str]:
    name = coder_run.config.name
    if coder_run.diverged:
        yield (
            f"{name} diverged and was stopped in train step {step:,}, "
            f"after {coder_run.rows_trained:,} rows; use a lower --lr"
        )
        return
    if not coder_run.rows_trained:
        yield f"no train row passes the filters of {name}; the coder is saved untrained"
    if evaluation is None:
        yield (
            f"no validation row passes the filters of {name}; the coder is saved without evaluation"
        )
    elif warning := l0_warning(coder_run.config, evaluation):
        yield f"{name} {warning}"


def l0_warning(
    config: CoderConfig, evaluation: Evaluation, reason: str | None = None
) -> str | None:
    """Return a warning where L0 on held-out rows is too far from K, with the reason."""
    ends_early = config.arch == "mp" and config.tolerance > 0  # as its user asked
    deviation = evaluation.l0_deviation
    if deviation is None or abs(deviation) <= L0_TOLERANCE or ends_early:
        return None
    return (
        f"has an L0 of {evaluation.l0:.4g} on validation rows, but its K is {evaluation.k} "
        f"({deviation:+.1%}): {reason or _reason(config)}"
    )


def l0_warnings(folder: Path, evaluations: Sequence[Evaluation]) -> list[str]:
    """Return warnings about the evaluations of a saved coder."""
    if not any(evaluation.rows for evaluation in evaluations):
        return [f"no validation row passes the filters of {folder.name}; train with other filters"]
    content = read_json(folder / "coder.json")
    config = coder_config_from_json(content["config"])
    has_running_threshold = "step" not in content["trained"] and config.architecture.has_threshold
    reason = "an earlier version followed its threshold during training; train it again"
    warnings = (
        l0_warning(config, e, reason if has_running_threshold and e.k == config.k else None)
        for e in evaluations
    )
    return [f"{folder.name} {warning}" for warning in warnings if warning]


def _reason(config: CoderConfig) -> str:
    if config.architecture.has_threshold:
        return "its threshold was set on train rows, and these rows differ from them"
    if config.architecture.is_pursuit:
        return "some pursuits stop early or choose a latent twice"
    return "some rows have fewer than K positive latents"
