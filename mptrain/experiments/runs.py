"""The runs of a sweep: each trains a list of coders, and each coder is in one of them.

All have the same settings, those of the sweep, and the same rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_json import coder_config_from_json
from mptrain.data.atomic_files import read_json
from mptrain.data.part_ranges import parse_ranges
from mptrain.runs.metrics import Record, read_records
from mptrain.runs.run_dir import CHANGEABLE_FIELDS

_FREE = {*CHANGEABLE_FIELDS, "write_threads", "trust_remote_code"}
# what sweeps of earlier versions did, whose files lack these settings
_EARLIER: dict[str, dict[str, Any]] = {
    "fit": {"only_tokens": "all"},
    "collect": {
        "chat_template": None,
        "one_document_per_sequence": False,
        "parse_special_tokens": True,
        "keep_empty_documents": True,
    },
}


@dataclass(frozen=True)
class SweepRun:
    """A run below a sweep's folder."""

    folder: Path
    coders: tuple[CoderConfig, ...]
    is_finished: bool = False
    order_digest: str | None = None
    "of the rows it reads; None before it has begun"
    parts: frozenset[int] = frozenset()
    "of the store, that it reads; none before it has begun"


@dataclass(frozen=True)
class Trained:
    """A coder as a run has left it."""

    config: CoderConfig
    folder: Path
    "of its run"
    records: tuple[Record, ...]
    "its lines of metrics.jsonl"
    result: Mapping[str, Any] | None
    "its row of results.json; None before the run has finished"
    parts: frozenset[int] = frozenset()
    "of the store, that its run reads"

    @property
    def latents(self) -> int | None:
        """How many it has; None before it is saved."""
        file = self.folder / "coders" / self.config.name / "coder.json"
        if not file.exists():
            return None
        return self.config.latents_of(read_json(file)["input_width"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its user has to know about it; nothing before the end."""
        return () if self.result is None else tuple(self.result.get("warnings", ()))

    @property
    def validation(self) -> Mapping[str, Any] | None:
        """On all held-out rows; None where it diverged, or before the end."""
        return None if self.result is None else self.result["validation"]


def find_runs(folder: Path) -> tuple[SweepRun, ...]:
    """Runs that have begun, in their order."""
    files = (f for f in _place(folder).glob("*/config.json") if f.parent.name.isdecimal())
    ordered = sorted(files, key=lambda file: int(file.parent.name))
    return tuple(_run(file.parent, read_json(file)) for file in ordered)


def saved_settings(folder: Path) -> Path:
    """Where a sweep keeps its experiment file, with all defaults."""
    return folder / "experiment.json"


def refuse_other_settings(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Check that a resolved experiment file goes with what is there; writes nothing.

    Figures, variants and coders may change: what is new is trained beside what is there. Rows and
    how they are read may not, nor at which steps is logged: the coders of a panel are to share it.
    """
    file = saved_settings(folder)
    if not file.exists():
        return
    stored = read_json(file, remedy="name another run")
    there = {table: {**earlier, **stored[table]} for table, earlier in _EARLIER.items()}
    different = [
        f"{table}.{name}: {json.dumps(there[table].get(name))} there, {json.dumps(value)} asked"
        for table in ("collect", "fit")
        for name, value in resolved[table].items()
        if name not in _FREE and there[table].get(name) != json.loads(json.dumps(value))
    ]
    if different:
        raise UsageError(
            f"{folder} has coders of other settings ({'; '.join(different)}), which all coders of "
            "a panel are to share; use the settings that are there (--set TABLE.NAME=VALUE), or "
            "another run"
        )


def refuse_other_rows(runs: Sequence[SweepRun]) -> None:
    """Check that all runs read the same rows."""
    if len({run.order_digest for run in runs}) > 1:
        told = " and ".join(str(run.folder) for run in runs)
        raise UsageError(
            f"{told} have trained on different rows, of a store that grew in between, and cannot "
            "be compared; name another run"
        )


def plan_runs(
    folder: Path, wanted: Sequence[CoderConfig], found: Sequence[SweepRun]
) -> tuple[SweepRun, ...]:
    """What is left to do: runs to go on with, then a new one for all coders that are in none."""
    left = {coder.name: coder for coder in wanted}
    for one in found:
        if one.is_finished:
            left = _without(left, one)
    begun = []
    for one in found:
        if not one.is_finished and any(coder.name in left for coder in one.coders):
            begun.append(one)
            left = _without(left, one)
    if not left:
        return tuple(begun)
    number = max((int(one.folder.name) for one in found), default=0) + 1
    return (*begun, SweepRun(_place(folder) / str(number), tuple(left.values())))


def read_trained(runs: Sequence[SweepRun]) -> dict[str, Trained]:
    """The coders of all runs, by name."""
    return {one.config.name: one for each in runs for one in _trained(each)}


def _place(folder: Path) -> Path:
    return folder / "runs"


def _run(folder: Path, config: Mapping[str, Any]) -> SweepRun:
    coders = tuple(coder_config_from_json(one) for one in config["coders"])
    finished = {coder.name for coder in coders} <= {row["coder"] for row in _results(folder)}
    parts = frozenset(parse_ranges(config["parts"]))
    return SweepRun(folder, coders, finished, config["order_digest"], parts)


def _results(folder: Path) -> list[dict[str, Any]]:
    """Of the run's coders that have come to their end."""
    file = folder / "results.json"
    rows: list[dict[str, Any]] = read_json(file) if file.exists() else []
    return rows


def _without(left: Mapping[str, CoderConfig], one: SweepRun) -> dict[str, CoderConfig]:
    names = {coder.name for coder in one.coders}
    return {name: coder for name, coder in left.items() if name not in names}


def _trained(one: SweepRun) -> list[Trained]:
    by_name: dict[str, list[Record]] = {coder.name: [] for coder in one.coders}
    metrics = one.folder / "metrics.jsonl"
    for record in read_records(metrics) if metrics.exists() else []:
        by_name[record.coder].append(record)
    results = {row["coder"]: row for row in _results(one.folder)}
    return [
        Trained(coder, one.folder, tuple(by_name[coder.name]), results.get(coder.name), one.parts)
        for coder in one.coders
    ]
