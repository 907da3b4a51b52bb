"""What a coder came to: its row of results.json, and what its user has to know about it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mptrain.config.coder import CoderConfig
from mptrain.config.coder_json import coder_config_from_json
from mptrain.data.atomic_files import read_json
from mptrain.evals.evaluate import Evaluation
from mptrain.training.setup import CoderRun

L0_TOLERANCE = 0.05  # of K


def result_of(
    coder_run: CoderRun, steps: int, batch_rows: int, evaluation: Evaluation | None
) -> dict[str, Any]:
    """A coder at the end of its training; `evaluation` is on all held-out rows."""
    so_far = result_so_far(coder_run, steps, batch_rows)
    return {
        **so_far,
        "validation": None if evaluation is None else asdict(evaluation),
        "warnings": list(_warnings(coder_run, so_far["step"], evaluation)),
    }


def result_so_far(coder_run: CoderRun, steps: int, batch_rows: int) -> dict[str, Any]:
    """A coder after its last train step, of `steps` planned.

    Rows and seconds are the coder's own: others may have trained on after it diverged.
    """
    step = coder_run.rows_read // batch_rows
    return {
        "coder": coder_run.config.name,
        "diverged": coder_run.diverged,
        "step": step,
        "steps": steps,
        "finished": step == steps,
        "rows_read": coder_run.rows_read,  # in the batches of its train steps
        "rows_trained": coder_run.rows_trained,  # of these, the ones that its filters left
        "train_seconds": coder_run.train_seconds,
        "rows_per_second": coder_run.rows_per_second,
    }


def _warnings(coder_run: CoderRun, step: int, evaluation: Evaluation | None) -> Iterator[str]:
    name = coder_run.config.name
    if coder_run.diverged:
        yield (
            f"{name} diverged and was stopped in train step {step:,}, "
            f"after {coder_run.rows_trained:,} rows; use a lower --lr"
        )
        return
    if not coder_run.rows_trained:
        yield f"no train row passes the filters of {name}; it is saved as it started"
    if evaluation is None:
        yield f"no validation row passes the filters of {name}; it is saved, not evaluated"
    elif warning := l0_warning(coder_run.config, evaluation):
        yield f"{name} {warning}"


def l0_warning(
    config: CoderConfig, evaluation: Evaluation, reason: str | None = None
) -> str | None:
    """How far L0 on held-out rows is from K, where that is too far, and why."""
    ends_early = config.arch == "mp" and config.tolerance > 0  # as its user asked
    if abs(evaluation.l0_deviation) <= L0_TOLERANCE or ends_early:
        return None
    return (
        f"has an L0 of {evaluation.l0:.4g} on held-out rows, its K is {evaluation.k} "
        f"({evaluation.l0_deviation:+.1%}): {reason or _reason(config)}"
    )


def l0_warnings(folder: Path, evaluations: Sequence[Evaluation]) -> list[str]:
    """What a user has to know of a saved coder's evaluations."""
    if not any(evaluation.rows for evaluation in evaluations):
        return [f"no held-out row passes the filters of {folder.name}; train with other filters"]
    about = read_json(folder / "coder.json")
    config = coder_config_from_json(about["config"])
    has_running_threshold = "step" not in about["trained"] and config.architecture.has_threshold
    reason = "an earlier version followed its threshold during training; train it again"
    warnings = (
        l0_warning(config, one, reason if has_running_threshold and one.k == config.k else None)
        for one in evaluations
    )
    return [f"{folder.name} {warning}" for warning in warnings if warning]


def _reason(config: CoderConfig) -> str:
    if config.architecture.has_threshold:
        return "these rows differ from the train rows that its threshold is from"
    if config.architecture.is_pursuit:
        return "rows end early, or choose a latent again"
    return "rows have fewer positive latents"
