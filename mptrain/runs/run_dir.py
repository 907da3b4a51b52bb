"""The folder of a run: the config that it began with, and whether a command may continue it."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.coder import CoderConfig
from mptrain.config.coder_grid import FitConfig
from mptrain.config.coder_json import coder_config_from_json
from mptrain.config.run import ListedConfig, RunConfig
from mptrain.data.atomic_files import explain_write_errors, is_partial, read_json, write_json
from mptrain.data.ranges_as_text import format_ranges, parse_ranges
from mptrain.training.learning_rate import LearningRate

# Settings that may differ between the commands of one run: where it lies, what it is computed on,
# when it is saved, how rows are fetched, and what fits into memory (a continued run keeps the
# passes of its last saved state).
CHANGEABLE_FIELDS = {
    "run", "store", "device", "spread", "log", "save_every", "read_threads",
    "cache_dir", "cache_bytes", "follow", "max_memory",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """The content of `RUN/config.json`: what a run began with."""

    fit: Mapping[str, Any]
    "all settings of the run"
    source: str
    "name of the store"
    coders: Sequence[Mapping[str, Any]]
    "name and settings of each coder"
    store_fingerprint: str
    order_digest: str
    "of the order of the train rows"
    parts: str | None = None
    'numbers of the store\'s parts that the run reads, as "0-3, 5"; None: a run of an old version'
    learning_rates: Mapping[str, Mapping[str, Any]] | None = None
    "peak learning rate of each coder, with its reason; None: a run of an old version"
    resolved: Mapping[str, Mapping[str, Any]] | None = None
    "settings of each coder whose default depends on the coder; None: a run of an old version"

    @property
    def provenance(self) -> dict[str, str]:
        """What a coder says about the rows that it was trained on."""
        return {"store_fingerprint": self.store_fingerprint, "order_digest": self.order_digest}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the provenance that its coders carry."""

    folder: Path
    provenance: Mapping[str, str]

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


def read_manifest(run: Path) -> RunManifest:
    """Return what a run began with.

    Raises:
        UsageError: the folder holds no run, or its `config.json` is of another tool.
    """
    file = run / "config.json"
    try:
        content = read_json(file, remedy="give another run")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{run} holds no run: {file} does not exist; give the folder of a run"
        ) from None
    try:
        return RunManifest(**content)
    except TypeError:
        raise UsageError(
            f"{run} holds no run: {file} is not the config of a run; give another folder"
        ) from None


def recorded_coders(run: Path) -> tuple[CoderConfig, ...]:
    """The coders of a run, in the order of its config.

    Raises:
        UsageError: the folder holds no run, or one of a version with other settings.
    """
    entries = read_manifest(run).coders
    try:
        coders = tuple(coder_config_from_json(entry) for entry in entries)
    except TypeError as error:
        raise UsageError(
            f"{run} has settings that this version of mptrain does not know ({error}); use the "
            "version that began the run"
        ) from None
    if [entry["name"] for entry in entries] != [coder.name for coder in coders]:
        raise _other_defaults_error(run)
    return coders


def recorded_parts(config: RunConfig) -> set[int] | None:
    """Return the parts of the store that a run reads.

    None for a new run, and for a run of an old version, which did not record its parts.
    """
    run = Path(config.run)
    if not (run / "config.json").exists():
        return None
    parts = read_manifest(run).parts
    return None if parts is None else parse_ranges(parts)


def recorded_learning_rates(config: RunConfig) -> dict[str, LearningRate] | None:
    """Return the peak learning rates that a run began with, by coder; None for a new run.

    A continued run keeps its rates, also where another version has another rule.

    Raises:
        UsageError: the run was begun by a version with other defaults.
    """
    run = Path(config.run)
    if not (run / "config.json").exists():
        return None
    manifest = read_manifest(run)
    if manifest.learning_rates is None or manifest.resolved != _resolved_settings(config):
        raise _other_defaults_error(run)
    return {name: LearningRate(**rate) for name, rate in manifest.learning_rates.items()}


def _resolved_settings(config: RunConfig) -> dict[str, Any]:
    return {
        coder.name: coder.resolved_settings(config.rows, config.batch_rows)
        for coder in config.coders()
    }


def _other_defaults_error(run: Path) -> UsageError:
    return UsageError(
        f"{run} was begun by a version of mptrain with other defaults; use that version, or start "
        "a new run with another --run"
    )


def open_run(
    config: RunConfig,
    source: str,
    fingerprint: str,
    order_digest: str,
    parts: Collection[int],
    rates: Mapping[str, LearningRate],
) -> RunFolder:
    """Make the folder of a new run, or check that a run there has the same config and rows.

    `parts` are the numbers of the store's parts that the run reads, also when the store grows;
    `rates` are the peak learning rates of its coders.

    Raises:
        UsageError: the folder holds another run or other files, or cannot be written.
    """
    check_same_run(config, fingerprint)
    folder = Path(config.run)
    manifest = RunManifest(
        fit=asdict(config),
        source=source,
        coders=[{"name": coder.name, **asdict(coder)} for coder in config.coders()],
        store_fingerprint=fingerprint,
        order_digest=order_digest,
        parts=format_ranges(parts),
        learning_rates={name: asdict(rate) for name, rate in rates.items()},
        resolved=_resolved_settings(config),
    )
    file = folder / "config.json"
    if not file.exists():
        with explain_write_errors(folder):
            write_json(file, asdict(manifest))
    elif read_manifest(folder).order_digest != order_digest:
        raise UsageError(
            f"the run {folder} cannot continue: the store lacks parts that it had when the run "
            "began; collect these parts again, or start a new run with another --run"
        )
    return RunFolder(folder, manifest.provenance)


def check_same_run(config: RunConfig, fingerprint: str) -> None:
    """Check that the run folder is new, or holds a run with this config and store fingerprint.

    Writes nothing.

    Raises:
        UsageError: the folder holds another run, and what differs; or it holds other files.
    """
    folder = Path(config.run)
    if (folder / "config.json").exists():
        _check_same_settings(folder, config, fingerprint)
    elif folder.is_file() or (folder.is_dir() and not all(map(is_partial, folder.iterdir()))):
        raise UsageError(
            f"{folder} has other files, but no run; give a new or empty folder with --run"
        )


def resumed_config(run: str, changes: Mapping[str, Any]) -> RunConfig:
    """Return the config of a run, with changed settings.

    `spread` is never taken from the run: each command says how many processes there are.

    Raises:
        UsageError: there is no such run, or a changed setting is not in `CHANGEABLE_FIELDS`.
    """
    allowed = CHANGEABLE_FIELDS - {"run"}
    for name in changes.keys() - allowed:
        raise UsageError(
            f"{name} cannot be given with --resume, which takes it from the run; remove {name}; "
            f"only these can be changed: {', '.join(sorted(allowed))}"
        )
    stored = read_manifest(Path(run)).fit
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
    new_values = {"spread": None, **changes, "run": run}
    try:
        if "listed" not in values:
            return FitConfig(**{**values, **new_values})
        listed = tuple(coder_config_from_json(coder) for coder in values.pop("listed"))
        return ListedConfig(listed=listed, **{**values, **new_values})
    except TypeError as error:
        raise UsageError(
            f"{run} has settings that this version of mptrain does not know ({error}); use the "
            "version that began the run"
        ) from None


def _check_same_settings(folder: Path, config: RunConfig, fingerprint: str) -> None:
    manifest = read_manifest(folder)
    new = _as_stored(asdict(config))
    # a run of an earlier version used the default of a setting that was added later
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    old = {**_as_stored(defaults), **manifest.fit}
    pairs = [
        (name, old.get(name), value) for name, value in new.items() if name not in CHANGEABLE_FIELDS
    ]
    pairs += [("store_fingerprint", manifest.store_fingerprint, fingerprint)]
    differences = [
        f"{name}: {_format(before)} there, {_format(now)} asked"
        for name, before, now in pairs
        if before != now
    ]
    if differences:
        raise UsageError(
            f"{folder} is a run with a different config ({'; '.join(differences)}); "
            "use the config of that run, or give another folder with --run"
        )


def _as_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as JSON gives them back: tuples become lists."""
    stored: dict[str, Any] = json.loads(json.dumps(values))
    return stored


def _format(value: Any) -> str:
    """Return a JSON value as it is written on the command line."""
    if value is None or value == []:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
