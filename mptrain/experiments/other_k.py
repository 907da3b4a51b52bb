"""FVU of the trained coders at other K than their own; existing results are reused."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from mptrain.data.atomic_files import json_safe, read_json, write_json
from mptrain.evals.evaluate import evaluate_coder
from mptrain.experiments.runs import TrainedCoder
from mptrain.experiments.spec import Experiment
from mptrain.experiments.verdicts import CodersByName


def evaluate_other_k(
    part: Experiment,
    folder: Path,
    coders: CodersByName,
    open_store: Callable[[], str],
    *,
    quiet: bool,
) -> dict[str, dict[int, float]]:
    """FVU at each K of the figures' `other_k` and at the coder's own K, by the coder's name.

    `open_store` gives the store; it is called only if a coder has to be evaluated.
    """
    fvus: dict[str, dict[int, float]] = {}
    wanted = [
        (coder, figure.settings.other_k)
        for figure in part.figures
        for coder in figure.coders
        if figure.settings.other_k
    ]
    for config, other_k in tqdm(wanted, "other K", unit="coder", disable=quiet or not wanted):
        coder = coders.get(config.name)
        if coder is None or coder.validation is None:
            continue
        file = folder / "other-k" / f"{config.name}.json"
        known = _read_fvus(file)
        if not {*other_k, config.k} <= known.keys():
            known |= _evaluate(part, coder, open_store(), other_k)
            write_json(file, {str(k): json_safe(known[k]) for k in sorted(known)})
        fvus[config.name] = {k: known[k] for k in sorted({*other_k, config.required_k})}
    return fvus


def _read_fvus(file: Path) -> dict[int, float]:
    if not file.exists():
        return {}
    return {int(k): float(fvu) for k, fvu in read_json(file).items()}


def _evaluate(
    part: Experiment, coder: TrainedCoder, store: str, other_k: Sequence[int]
) -> dict[int, float]:
    settings = part.run_settings
    evaluations = evaluate_coder(
        coder.path,
        store,
        other_k,
        settings["eval_rows"],
        settings["device"],
        parts=coder.parts,
        cache_dir=settings["cache_dir"],
        cache_bytes=settings["cache_bytes"],
    )
    return {evaluation.k: evaluation.fvu for evaluation in evaluations if evaluation.k is not None}
