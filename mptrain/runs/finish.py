"""The end of a pass: evaluate its coders on all held-out rows, and save them with their results."""

from collections.abc import Sequence

from mptrain.coders.checkpoint import save_coder
from mptrain.coders.coder import Coder
from mptrain.data.atomic_files import write_json
from mptrain.evals.evaluate import Evaluation
from mptrain.runs.convergence import convergence_of
from mptrain.runs.metrics_file import Record, read_records
from mptrain.runs.metrics_sink import MetricsSink
from mptrain.runs.pass_context import TrainingPass
from mptrain.runs.results import CoderResult, final_result
from mptrain.runs.validator import Validator
from mptrain.training.learning_rate import rule_of
from mptrain.training.setup import CoderRun


def finish_pass(
    training_pass: TrainingPass, validator: Validator, sink: MetricsSink
) -> list[CoderResult]:
    """Evaluate and save the coders, and write `results.json`.

    Returns the results of this pass and of the passes before it.
    """
    sink.flush()
    training_pass.processes.barrier()  # every process reads the records of its coders
    records = _own_records(training_pass)
    coders = validator.snapshots()
    evaluations = validator.evaluate(coders, None)
    own_results = [
        _save(training_pass, coder_run, coder, evaluation, records[coder_run.config.name])
        for coder_run, coder, evaluation in zip(
            training_pass.coder_runs, coders, evaluations, strict=True
        )
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


def _own_records(training_pass: TrainingPass) -> dict[str, list[Record]]:
    """Return the records of each coder of this process, also those from before an interruption."""
    by_name: dict[str, list[Record]] = {run.config.name: [] for run in training_pass.coder_runs}
    metrics = training_pass.run.metrics
    for record in read_records(metrics) if metrics.exists() else []:
        if record.coder in by_name:
            by_name[record.coder].append(record)
    return by_name


def _save(
    training_pass: TrainingPass,
    coder_run: CoderRun,
    coder: Coder | None,
    evaluation: Evaluation | None,
    records: Sequence[Record],
) -> CoderResult:
    """Save a coder unless it has diverged, and return its result."""
    if evaluation is not None and not evaluation.rows:
        evaluation = None
    elif evaluation is not None and not evaluation.is_finite:
        coder_run.diverged, evaluation = True, None  # in its last update
    config = training_pass.config
    convergence = convergence_of(records, rule_of(coder_run.config).steps)
    result = final_result(
        coder_run, training_pass.steps, config.batch_rows, evaluation, convergence
    )
    if training_pass.processes.saves_coders and coder is not None and not coder_run.diverged:
        run = training_pass.run
        filters = training_pass.filters.of(coder_run.sides).as_json()
        settings = coder_run.config.resolved_settings(config.rows, config.batch_rows)
        resolved = {"lr": coder_run.trainer.optimizers.peak_lr, **settings}
        trained = {**run.provenance, **filters, **result.to_json(), "resolved": resolved}
        save_coder(run.folder / "coders" / coder_run.config.name, coder, trained)
    return result
