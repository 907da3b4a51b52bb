"""The runs of a sweep: each trains a list of coders, and each coder is in one run.

All runs have the settings of the sweep, and read the same rows.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_version_1 import upgrade_description
from mptrain.data.atomic_files import read_json
from mptrain.data.ranges_as_text import parse_ranges
from mptrain.experiments.option_tables import RUN_OPTIONS, TABLE_OF_OPTION
from mptrain.runs.convergence import Convergence, convergence_of
from mptrain.runs.metrics_file import Record, read_records
from mptrain.runs.run_dir import CHANGEABLE_FIELDS, read_manifest, recorded_coders
from mptrain.training.learning_rate import rule_of

NEW_FOLDER = "another path to the key folder of the experiment file"
"what a remedy asks for where the results in a folder do not fit an experiment"
# may differ between the commands of a sweep
_CHANGEABLE = {*CHANGEABLE_FIELDS, "write_threads", "trust_remote_code"}
_COMPARED_TABLES = ("collect", *dict.fromkeys(TABLE_OF_OPTION[name] for name in RUN_OPTIONS))


@dataclass(frozen=True)
class SweepRun:
    """A run in the folder of a sweep."""

    folder: Path
    coders: tuple[CoderConfig, ...]
    is_finished: bool = False
    order_digest: str | None = None
    "digest of the order of rows; None before the run has started"
    parts: frozenset[int] = frozenset()
    "parts of the store that the run reads; empty before the run has started"


@dataclass(frozen=True)
class TrainedCoder:
    """A coder, as far as its run has trained it."""

    config: CoderConfig
    folder: Path
    "folder of the run"
    records: tuple[Record, ...]
    "the coder's lines of metrics.jsonl"
    result: Mapping[str, Any] | None
    "the coder's row of results.json; None before the run has finished"
    parts: frozenset[int] = frozenset()
    "parts of the store that the run reads"
    peak_lr: float | None = None
    "peak learning rate; None for a run of an old version"

    @property
    def path(self) -> Path:
        """The folder of the saved coder."""
        return self.folder / "coders" / self.config.name

    @property
    def latents(self) -> int | None:
        """Number of latents; None before the coder is saved."""
        file = self.path / "coder.json"
        if not file.exists():
            return None
        description = read_json(file)
        if description["format_version"] == 1:
            description = upgrade_description(description)
        return self.config.latents_of(description["input_widths"][0])

    @property
    def diverged(self) -> bool:
        """Whether its run has finished and it diverged."""
        return self.result is not None and bool(self.result["diverged"])

    @property
    def convergence(self) -> Convergence | None:
        """How its FVU fell in the end, as far as it is trained; from the records of any version."""
        return convergence_of(self.records, rule_of(self.config).steps)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the result; none before the run has finished."""
        return () if self.result is None else tuple(self.result.get("warnings", ()))

    @property
    def validation(self) -> Mapping[str, Any] | None:
        """Metrics on all held-out rows; None if the coder diverged or has not finished."""
        return None if self.result is None else self.result["validation"]


def find_runs(folder: Path) -> tuple[SweepRun, ...]:
    """The runs of a sweep that have started, in their order."""
    configs = (f for f in _runs_folder(folder).glob("*/config.json") if f.parent.name.isdecimal())
    folders = sorted((file.parent for file in configs), key=lambda run: int(run.name))
    return tuple(_read_run(run) for run in folders)


def resolved_file(folder: Path) -> Path:
    """The file in which a sweep keeps its experiment, with all defaults."""
    return folder / "experiment.json"


def check_same_settings(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Check that a resolved experiment has the settings of the runs in a folder.

    Figures, variants and coders may change: new coders are trained beside the existing ones. The
    rows, their order and the steps of evaluations may not: all coders of a panel share
    them.

    Raises:
        UsageError: names the settings that differ.
    """
    file = resolved_file(folder)
    if not file.exists():
        return
    stored = read_json(file, remedy=f"give {NEW_FOLDER}")
    if missing := [table for table in _COMPARED_TABLES if table not in stored]:
        raise UsageError(
            f"{file} was written by another version of mptrain: it has no table [{missing[0]}]; "
            f"give {NEW_FOLDER}"
        )
    differences = [
        f"{table}.{name}: {json.dumps(stored[table].get(name))} there, {json.dumps(value)} here"
        for table in _COMPARED_TABLES
        for name, value in resolved[table].items()
        if name not in _CHANGEABLE and stored[table].get(name) != json.loads(json.dumps(value))
    ]
    if differences:
        raise UsageError(
            f"{folder} has coders with different settings ({'; '.join(differences)}), but all "
            "coders of an experiment must share them; use the settings of that folder (--set "
            f"TABLE.KEY=VALUE), or give {NEW_FOLDER}"
        )


def check_same_rows(runs: Sequence[SweepRun]) -> None:
    """Check that all runs read the same rows.

    Raises:
        UsageError: names the runs.
    """
    if len({run.order_digest for run in runs}) > 1:
        folders = " and ".join(str(run.folder) for run in runs)
        raise UsageError(
            f"the runs {folders} trained on different rows, because the store grew in between, "
            f"so they cannot be compared; give {NEW_FOLDER}"
        )


def plan_runs(
    folder: Path, coders: Sequence[CoderConfig], runs: Sequence[SweepRun]
) -> tuple[SweepRun, ...]:
    """The runs that are left to do: unfinished ones, then a new one for coders that are in none."""
    left = {coder.name: coder for coder in coders}
    for run in runs:
        if run.is_finished:
            left = _without(left, run)
    unfinished = []
    for run in runs:
        if not run.is_finished and any(coder.name in left for coder in run.coders):
            unfinished.append(run)
            left = _without(left, run)
    if not left:
        return tuple(unfinished)
    number = max((int(run.folder.name) for run in runs), default=0) + 1
    return (*unfinished, SweepRun(_runs_folder(folder) / str(number), tuple(left.values())))


def read_trained(runs: Sequence[SweepRun]) -> dict[str, TrainedCoder]:
    """The coders of all runs, by name."""
    return {coder.config.name: coder for run in runs for coder in _read_coders(run)}


def validations(trained: TrainedCoder) -> list[Record]:
    """The records with a finite validation FVU."""
    return [
        record
        for record in trained.records
        if record.validation_fvu is not None and math.isfinite(record.validation_fvu)
    ]


def _runs_folder(folder: Path) -> Path:
    return folder / "runs"


def _read_run(folder: Path) -> SweepRun:
    manifest, coders = read_manifest(folder), recorded_coders(folder)
    is_finished = {coder.name for coder in coders} <= {row["coder"] for row in _results(folder)}
    parts = frozenset(parse_ranges(manifest.parts or ""))
    return SweepRun(folder, coders, is_finished, manifest.order_digest, parts)


def _results(folder: Path) -> list[dict[str, Any]]:
    """The results of the run's coders that have finished."""
    file = folder / "results.json"
    rows: list[dict[str, Any]] = read_json(file) if file.exists() else []
    return rows


def _without(left: Mapping[str, CoderConfig], run: SweepRun) -> dict[str, CoderConfig]:
    names = {coder.name for coder in run.coders}
    return {name: coder for name, coder in left.items() if name not in names}


def _read_coders(run: SweepRun) -> list[TrainedCoder]:
    by_name: dict[str, list[Record]] = {coder.name: [] for coder in run.coders}
    metrics = run.folder / "metrics.jsonl"
    for record in read_records(metrics) if metrics.exists() else []:
        by_name[record.coder].append(record)
    results = {row["coder"]: row for row in _results(run.folder)}
    rates = read_manifest(run.folder).learning_rates or {}
    return [
        TrainedCoder(
            coder,
            run.folder,
            tuple(by_name[coder.name]),
            results.get(coder.name),
            run.parts,
            rates.get(coder.name, {}).get("value"),
        )
        for coder in run.coders
    ]
