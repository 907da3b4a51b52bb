"""The end of a pass: evaluate its coders on all held-out rows, and save them with their results."""

from mptrain.coders.checkpoint import save_coder
from mptrain.coders.coder import Coder
from mptrain.data.atomic_files import write_json
from mptrain.evals.evaluate import Evaluation
from mptrain.runs.metrics_sink import MetricsSink
from mptrain.runs.pass_context import TrainingPass
from mptrain.runs.results import CoderResult, final_result
from mptrain.runs.validator import Validator
from mptrain.training.setup import CoderRun


def finish_pass(
    training_pass: TrainingPass, validator: Validator, sink: MetricsSink
) -> list[CoderResult]:
    """Evaluate and save the coders, and write `results.json`.

    Returns the results of this pass and of the passes before it.
    """
    sink.flush()
    coders = validator.snapshots()
    evaluations = validator.evaluate(coders, None)
    own_results = [
        _save(training_pass, *coder_run)
        for coder_run in zip(training_pass.coder_runs, coders, evaluations, strict=True)
    ]
    processes, progress = training_pass.processes, training_pass.progress
    gathered = processes.gather([result.to_json() for result in own_results])
    order = {name: index for index, name in enumerate(progress.names)}
    new = sorted(map(CoderResult.from_json, gathered), key=lambda result: order[result.coder])
    results = [*progress.finished, *new]
    if processes.is_first:
        write_json(
            training_pass.run.folder / "results.json", [result.to_json() for result in results]
        )
    return results


def _save(
    training_pass: TrainingPass,
    coder_run: CoderRun,
    coder: Coder | None,
    evaluation: Evaluation | None,
) -> CoderResult:
    """Save a coder unless it has diverged, and return its result."""
    if evaluation is not None and not evaluation.rows:
        evaluation = None
    elif evaluation is not None and not evaluation.is_finite:
        coder_run.diverged, evaluation = True, None  # in its last update
    config = training_pass.config
    result = final_result(coder_run, training_pass.steps, config.batch_rows, evaluation)
    if training_pass.processes.saves_coders and coder is not None and not coder_run.diverged:
        run = training_pass.run
        filters = training_pass.filters.of(coder_run.sides).as_json()
        trained = {**run.provenance, **filters, **result.to_json()}
        save_coder(run.folder / "coders" / coder_run.config.name, coder, trained)
    return result
