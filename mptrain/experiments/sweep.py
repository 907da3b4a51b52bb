"""Carry out an experiment: collect and train what is missing, draw, judge. Goes on where it was."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mpcache.errors import UsageError
from mptrain.config.coder import all_sides
from mptrain.config.run import ListedConfig
from mptrain.data.atomic_files import explain_write_errors, json_safe, read_json, write_json
from mptrain.data.loader import open_store
from mptrain.data.part_ranges import format_ranges
from mptrain.data.preflight import common_parts
from mptrain.evals.evaluate import evaluate_coder
from mptrain.experiments.captions import caption, other_k_rows, page, point_rows
from mptrain.experiments.figures import FvuByK, XQuantity, save_sweep_figure
from mptrain.experiments.runs import (
    SweepRun,
    Trained,
    find_runs,
    plan_runs,
    read_trained,
    refuse_other_rows,
    refuse_other_settings,
    saved_settings,
)
from mptrain.experiments.spec import Experiment, FigurePlan
from mptrain.experiments.tables import write_table
from mptrain.experiments.verdicts import Coders, Verdict, faults, judge
from mptrain.runs.fit import fit
from mptrain.training.distributed import is_distributed

Collect = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Outcome:
    """What a sweep has made."""

    files: tuple[Path, ...]
    verdicts: tuple[Verdict, ...]
    faults: tuple[str, ...]
    "panels without a curve, variants that do nothing"
    warnings: tuple[str, ...]
    "of the coders' results"


def sweep(
    experiment: Experiment,
    only: Sequence[str],
    collected: Mapping[str, Any],
    *,
    collect: Collect,
    hardware: str,
    quiet: bool = True,
) -> Outcome:
    """Bring the experiment, or the part that `only` names, to its figures.

    `collected` are the settings of the collection, which `collect` carries out: it gets the sides
    that are needed, and gives the store. It is called only where something is left to do. All runs
    read the parts that the first one began with, also where the store has grown since.

    Raises:
        ValueError: the user's mistake, such as a folder that holds other settings' coders.
        KeyboardInterrupt: as it comes; the same call goes on.
    """
    if is_distributed():
        raise UsageError("a sweep is one process, got several of torchrun; start it without")
    folder = Path(experiment.head.run)
    part = experiment.only(only)
    keep_experiment(folder, experiment.resolved(collected))
    begun = find_runs(folder)
    refuse_other_rows(begun)
    parts = begun[0].parts if begun else None
    left = plan_runs(folder, part.coders, begun)
    store = None
    if left:
        for told in (told for run in left for told in config_of(experiment, run, "").warnings()):
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        store = collect(part.sides)
        _refuse_unsuited(part, left, parts, store)
    for run in left:
        _note_hardware(folder, run, hardware)
        fit(config_of(experiment, run, store or ""), quiet=quiet, parts=parts)
    runs = find_runs(folder)
    refuse_other_rows(runs)
    coders = {c.name: one for c in part.coders if (one := read_trained(runs).get(c.name))}
    other_k = _other_k(part, folder, coders, store, collect, quiet=quiet)
    files = [
        file
        for plan in part.figures
        for file in _figure(part, plan, folder, coders, other_k, collected)
    ]
    return Outcome(
        tuple(files),
        tuple(verdict for panel in part.panels for verdict in judge(panel, coders)),
        tuple(faults(part.panels, coders)),
        tuple(warning for one in coders.values() for warning in one.warnings),
    )


def keep_experiment(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Save the resolved file beside the results, if it goes with what is there."""
    refuse_other_settings(folder, resolved)
    with explain_write_errors(folder):
        write_json(saved_settings(folder), resolved)


def config_of(experiment: Experiment, run: SweepRun, store: str) -> ListedConfig:
    """What a run of the experiment is trained with."""
    return ListedConfig(**experiment.fit, store=store, run=str(run.folder), listed=run.coders)


def _note_hardware(folder: Path, run: SweepRun, hardware: str) -> None:
    """Keep on what each run was trained: it may go on elsewhere."""
    noted = _hardware(folder)
    machines = noted.setdefault(run.folder.name, [])
    if hardware not in machines:
        machines.append(hardware)
    write_json(folder / "hardware.json", noted)


def _hardware(folder: Path) -> dict[str, list[str]]:
    file = folder / "hardware.json"
    found: dict[str, list[str]] = read_json(file) if file.exists() else {}
    return found


def _refuse_unsuited(
    part: Experiment, left: Sequence[SweepRun], parts: Collection[int] | None, place: str
) -> None:
    """Check before any training what would else be found after it."""
    store = open_store(place)
    part.refuse_other_k(lambda coder: coder.latents_of(store.width(*coder.sides[0])))
    for run in left:
        there = common_parts(store, all_sides(run.coders))
        if lost := set(parts or ()) - there:
            raise UsageError(
                f"{store.storage} lacks parts {format_ranges(lost)}, which the coders in "
                f"{part.head.run} have trained on; collect them again, or name another run"
            )


def _other_k(
    part: Experiment,
    folder: Path,
    coders: Coders,
    store: str | None,
    collect: Collect,
    *,
    quiet: bool,
) -> FvuByK:
    """FVU of the figures' coders at other K than their own; what is there is not done again."""
    found: dict[str, dict[int, float]] = {}
    wanted = [
        (coder, figure.table.other_k)
        for figure in part.figures
        for panel in figure.panels
        for line in panel.lines
        for coder in line.coders
        if figure.table.other_k
    ]
    for config, other_k in tqdm(wanted, "other K", unit="coder", disable=quiet or not wanted):
        trained = coders.get(config.name)
        if trained is not None and trained.validation is not None:
            file = folder / "other-k" / f"{config.name}.json"
            there = _read_fvus(file)
            if not {*other_k, config.k} <= there.keys():
                store = store or collect(part.sides)
                there |= _evaluate(part, trained, store, other_k)
                write_json(file, {str(k): json_safe(there[k]) for k in sorted(there)})
            found[config.name] = {k: there[k] for k in sorted({*other_k, config.k})}
    return found


def _read_fvus(file: Path) -> dict[int, float]:
    if not file.exists():
        return {}
    return {int(k): float(fvu) for k, fvu in read_json(file).items()}


def _evaluate(
    part: Experiment, trained: Trained, store: str, other_k: Sequence[int]
) -> dict[int, float]:
    place = trained.folder / "coders" / trained.config.name
    rows, device = part.fit["eval_rows"], part.fit["device"]
    cache = {name: part.fit[name] for name in ("cache_dir", "cache_bytes")}
    found = evaluate_coder(place, store, other_k, rows, device, parts=trained.parts, **cache)
    return {one.k: one.fvu for one in found}


def _figure(
    part: Experiment,
    plan: FigurePlan,
    folder: Path,
    coders: Coders,
    other_k: FvuByK,
    collected: Mapping[str, Any],
) -> list[Path]:
    """Pictures, tables and page of one figure."""
    place = folder / "figures" / plan.name
    place.mkdir(parents=True, exist_ok=True)
    shown = {c.name for p in plan.panels for line in p.lines for c in line.coders}
    used = {one.folder.name for name, one in coders.items() if name in shown}
    noted = _hardware(folder)
    machines = list(dict.fromkeys(m for run in sorted(used) for m in noted.get(run, ())))
    axes: tuple[XQuantity, ...] = (
        ("time", "rows", "other-k") if plan.table.other_k else ("time", "rows")
    )
    told = {axis: caption(part, collected, plan, coders, machines, axis) for axis in axes}
    files = [
        file
        for axis in axes
        for file in save_sweep_figure(plan, coders, other_k, axis, told[axis], place / axis)
    ]
    verdicts = [verdict for panel in plan.panels for verdict in judge(panel, coders)]
    files += write_table(point_rows(plan, coders), place / "points")
    files += write_table([asdict(verdict) for verdict in verdicts], place / "verdicts")
    if plan.table.other_k:
        files += write_table(other_k_rows(plan, coders, other_k), place / "other-k")
    pictures = [(f"{axis}.png", told[axis]) for axis in axes]
    (place / "figure.md").write_text(page(plan, pictures, verdicts))
    return [*files, place / "figure.md"]
