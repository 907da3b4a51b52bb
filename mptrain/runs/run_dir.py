"""The folder of a run: what it was started with, and whether a later command may go on with it."""

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mpcache.errors import UsageError
from mptrain.config.coder_json import coder_config_from_json
from mptrain.config.fit import FitConfig
from mptrain.config.run import ListedConfig, RunConfig
from mptrain.data.atomic_files import explain_write_errors, is_partial, read_json, write_json
from mptrain.data.part_ranges import format_ranges, parse_ranges

# where a run lives, what it is computed on, when it is saved, how rows are fetched and what fits
# into memory may change between its commands; passes are those of the last saved state, if any
CHANGEABLE_FIELDS = {
    "run", "store", "device", "spread", "log", "save_every", "save_minutes", "window_bytes",
    "read_threads", "cache_dir", "cache_bytes", "follow", "max_memory",
}  # fmt: skip


_KEYS = ("fit", "source", "coders")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and the provenance that its coders carry."""

    folder: Path
    provenance: dict[str, Any]

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


def read_run_config(run: Path) -> dict[str, Any]:
    """What a run was started with: its `config.json`.

    Raises:
        ValueError: there is no run, or the file is another tool's.
    """
    file = run / "config.json"
    try:
        started = read_json(file, remedy="name another run")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{run} is no run that was begun: no {file}; check the path") from None
    if not isinstance(started, dict) or any(key not in started for key in _KEYS):
        raise UsageError(f"{run} is no run: {file} is not a run's; name another folder")
    return started


def recorded_parts(config: RunConfig) -> set[int] | None:
    """The store's parts that the run there reads; None where there is none yet, or one of an
    earlier version, which did not keep them.
    """
    run = Path(config.run)
    if not (run / "config.json").exists():
        return None
    parts = read_run_config(run).get("parts")
    return None if parts is None else parse_ranges(parts)


def open_run(
    config: RunConfig, source: str, fingerprint: str, order_digest: str, parts: Collection[int]
) -> RunFolder:
    """Make the run, or check that the one there was started with the same config and rows.

    `parts` are those of the store that it reads, also when more of them are there later.

    Raises:
        ValueError: the folder holds another run, or something that is no run, or cannot be written;
            says what differs.
    """
    check_same_run(config, fingerprint)
    folder = Path(config.run)
    provenance = {"store_fingerprint": fingerprint, "order_digest": order_digest}
    started = {
        "fit": asdict(config),
        "source": source,
        "coders": [{"name": one.name, **asdict(one)} for one in config.coders()],
        **provenance,
        "parts": format_ranges(parts),
    }
    file = folder / "config.json"
    if not file.exists():
        with explain_write_errors(folder):
            write_json(file, started)
    elif read_run_config(folder)["order_digest"] != order_digest:
        raise UsageError(
            f"{folder} cannot go on: the store lacks parts that were there when the run "
            "began; name another run"
        )
    return RunFolder(folder, provenance)


def check_same_run(config: RunConfig, fingerprint: str) -> None:
    """ValueError where the folder holds another run, or something that is no run; writes nothing.

    `fingerprint` is that of the store. Says what differs.
    """
    folder = Path(config.run)
    file = folder / "config.json"
    if file.exists():
        _refuse_difference(folder, config, fingerprint)
    elif folder.is_file() or (folder.is_dir() and not all(map(is_partial, folder.iterdir()))):
        raise UsageError(f"{folder} exists and is no run; name a new or empty folder")


def resumed_config(run: str, given: Mapping[str, Any]) -> RunConfig:
    """The config of a run that was begun; `given` is what may change between its commands.

    What processes share is of the command alone: another one may start more of them, or only one.

    Raises:
        ValueError: there is no such run, or something else is given.
    """
    allowed = CHANGEABLE_FIELDS - {"run"}
    for name in given.keys() - allowed:
        told = ", ".join(sorted(allowed))
        raise UsageError(f"--resume takes {name} from the run; beside it may be given {told}")
    started = read_run_config(Path(run))["fit"]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in started.items()}
    changes = {"spread": None, **given, "run": run}
    try:
        if "listed" not in values:
            return FitConfig(**{**values, **changes})
        listed = tuple(coder_config_from_json(coder) for coder in values.pop("listed"))
        return ListedConfig(listed=listed, **{**values, **changes})
    except TypeError as error:
        raise UsageError(
            f"{run} has settings that are unknown here ({error}); use the mptrain that began it"
        ) from None


def _refuse_difference(folder: Path, config: RunConfig, fingerprint: str) -> None:
    stored = read_run_config(folder)
    wanted = _as_stored(asdict(config))
    # a run of an earlier version did what is the default of a setting that came later
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    there = {**_as_stored(defaults), **stored["fit"]}
    pairs = [
        (name, there.get(name), value)
        for name, value in wanted.items()
        if name not in CHANGEABLE_FIELDS
    ]
    pairs += [("store_fingerprint", stored["store_fingerprint"], fingerprint)]
    different = [
        f"{n}: {_told(old)} there, {_told(new)} asked" for n, old, new in pairs if old != new
    ]
    if different:
        raise UsageError(
            f"{folder} is a run with another config ({'; '.join(different)}); "
            "use its config, or name another run"
        )


def _as_stored(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they read back from JSON, so that tuples compare as lists."""
    stored: dict[str, Any] = json.loads(json.dumps(values))
    return stored


def _told(value: Any) -> str:
    """A value of a JSON file as one would write it on the command line."""
    if value is None or value == []:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
